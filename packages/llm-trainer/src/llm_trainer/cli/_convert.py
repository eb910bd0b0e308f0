"""What `llm-trainer export` and `llm-trainer import` do."""

from __future__ import annotations

from pathlib import Path

import torch

from llm_trainer.cli._models import load_model
from llm_trainer.cli._table import print_table
from llm_trainer.exceptions import ConfigurationError
from llm_trainer.models import TransformerLM
from llm_trainer.tokenizer import load_tokenizer
from llm_trainer.training.utils import setup_logging


def export_folder(model_dir: Path, out: Path, *, log_level: str) -> None:
    """Write a model and its tokenizer as a checkpoint of transformers.

    Raises:
        ConfigurationError: There is no model, or `out` holds one that was not exported.
        ModelConfigurationError: transformers has no such model.
    """
    setup_logging(log_level)
    model, tokenizer = load_model(model_dir, torch.device("cpu"))
    try:
        model.export_hf(out, tokenizer)
    except FileExistsError as error:
        raise ConfigurationError(str(error)) from error
    print_table(
        f"Exported to {out}", {"parameters": model.get_num_params(), "size in MB": model.get_model_size_mb()}
    )


def import_folder(hf_dir: Path, out: Path, *, log_level: str) -> None:
    """Read a checkpoint of transformers and write it as a model of this package.

    Raises:
        ModelConfigurationError: Its architecture is another one than Llama's or GPT-2's.
        FormatError: A file is missing or damaged.
    """
    setup_logging(log_level)
    if out.resolve() == hf_dir.resolve():
        raise ConfigurationError(f"{out} is the folder that is read; give another one to write.")
    model = TransformerLM.from_hf(hf_dir)
    fingerprint = None
    vocabulary = "no tokenizer.json; generate and evaluate need one"
    if (hf_dir / "tokenizer.json").exists():
        tokenizer = load_tokenizer(hf_dir)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ConfigurationError(
                f"The tokenizer of {hf_dir} has {tokenizer.vocab_size} tokens, the model only "
                f"{model.config.vocab_size}: they do not belong together."
            )
        tokenizer.save_pretrained(out)
        fingerprint = tokenizer.fingerprint()
        vocabulary = f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens"
    model.save_pretrained(out, tokenizer_fingerprint=fingerprint)
    print_table(
        f"Imported to {out}",
        {
            "parameters": model.get_num_params(),
            "size in MB": model.get_model_size_mb(),
            "tokenizer": vocabulary,
        },
    )
