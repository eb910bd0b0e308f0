"""What `llm-trainer evaluate` does."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

from llm_trainer._files import write_json
from llm_trainer.cli._generate import Sampling, continue_ids
from llm_trainer.cli._models import load_model, pick_device
from llm_trainer.cli._settings import check_length
from llm_trainer.cli._table import duration, finite, print_table
from llm_trainer.config import DataConfig
from llm_trainer.data import LanguageModelingDataset, create_dataloader, load_splits
from llm_trainer.data._splits import checked_sources, held_out, training_source
from llm_trainer.exceptions import ConfigurationError, DataError
from llm_trainer.models import TransformerLM
from llm_trainer.tokenizer import Tokenizer
from llm_trainer.training.utils import setup_logging
from llm_trainer.utils.metrics import bits_per_byte, evaluate_generation_quality, mean_loss, perplexity_of

_PROMPT_TOKENS, _NEW_TOKENS = 32, 64


def evaluate_model(
    model_path: Path,
    text: tuple[DataConfig, bool],
    *,
    output_path: Path | None,
    max_batches: int | None,
    batch_size: int,
    continuations: int,
    seed: int,
    device: str | None,
    as_json: bool,
    log_level: str,
) -> None:
    """Measure a model on text, print the results, and write them if asked to.

    Args:
        model_path: Folder of the model.
        text: Configuration whose held-out text is evaluated on, and whether its `max_length` was asked for;
            else rows are as long as the model reads.
        output_path: JSON file to write.
        max_batches: Batches to evaluate on; None for all.
        batch_size: Rows in a batch.
        continuations: Texts to continue and measure.
        seed: Of the continuations.
        device: Where to compute.
        as_json: Whether to print JSON.
        log_level: What to log.

    Raises:
        ConfigurationError: There is no model, no held-out text, or its rows are too long for the model.
        DataError: The text is missing, empty or not text.
    """
    setup_logging(log_level)
    data = held_out(text[0])
    if data is None:
        raise ConfigurationError("The data names no text to evaluate on; set validation_file.")
    checked_sources(data)
    place = pick_device(device)
    model, tokenizer = load_model(model_path, place)
    if not text[1]:
        data = dataclasses.replace(data, max_length=model.config.max_seq_len)
    check_length(data, model.config)
    rows = load_splits(dataclasses.replace(data, validation_split=None), tokenizer).train

    def batches() -> Iterator[dict[str, Tensor]]:
        # Packing puts long documents first, so the first rows alone would not stand for all.
        loader = create_dataloader(rows, batch_size, shuffle=max_batches is not None, seed=0)
        return islice(loader, max_batches)

    started = time.perf_counter()
    loss, tokens = mean_loss(model, batches(), place)
    if not tokens:
        raise DataError("The text has no token to predict.")
    total = -(-len(rows) // batch_size)
    results: dict[str, Any] = {
        "model": str(model_path),
        "text": training_source(data).name,
        "loss": loss,
        "perplexity": perplexity_of(loss),
        "bits_per_byte": bits_per_byte(loss, batches(), tokenizer),
        "tokens": tokens,
        "batches": total if max_batches is None else min(total, max_batches),
        "seconds": time.perf_counter() - started,
    }
    if continuations:
        results["generation"] = _continue_texts(rows, model, tokenizer, continuations, seed)
    results = finite(results)
    if output_path is not None:
        write_json(output_path, results)
    if as_json:
        typer.echo(json.dumps(results, indent=2))
        return
    generation = results.pop("generation", None)
    results["seconds"] = duration(results["seconds"])
    print_table("Evaluation", {name.replace("_", " "): value for name, value in results.items()})
    if generation is not None:
        print_table("Continuations", {name.replace("_", " "): value for name, value in generation.items()})


def _continue_texts(
    rows: LanguageModelingDataset, model: TransformerLM, tokenizer: Tokenizer, count: int, seed: int
) -> dict[str, float]:
    """Continue the beginnings of documents, and compare with how they go on."""
    device = model.embedding.weight.device
    prompt_tokens = min(_PROMPT_TOKENS, model.config.max_seq_len // 2)
    sampling = Sampling(max_new_tokens=min(_NEW_TOKENS, model.config.max_seq_len - prompt_tokens))
    generator = torch.Generator(device).manual_seed(seed)
    generated: list[str] = []
    references: list[str] = []
    for ids in _first_documents(rows):
        prompt, rest = ids[:prompt_tokens], ids[prompt_tokens : prompt_tokens + _NEW_TOKENS]
        if not tokenizer.decode(rest).strip():
            continue
        produced = continue_ids(model, tokenizer, prompt, sampling, generator)
        generated.append(tokenizer.decode(produced[len(prompt) :]))
        references.append(tokenizer.decode(rest))
        if len(generated) == count:
            break
    if not generated:
        raise DataError(
            f"No text is longer than the {prompt_tokens} tokens that a continuation begins with; leave "
            "--generate out."
        )
    return evaluate_generation_quality(generated, references)


def _first_documents(rows: LanguageModelingDataset) -> Iterator[list[int]]:
    """Yield the first document of each row, as far as it is there."""
    for index in range(len(rows)):
        row = rows[index]
        yield [int(token) for token in row["input_ids"][row["attention_mask"] == 1]]
