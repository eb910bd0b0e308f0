"""What `llm-trainer generate` does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import typer

from llm_trainer._files import write_json
from llm_trainer.cli._models import load_model, pick_device
from llm_trainer.exceptions import DataError, GenerationError
from llm_trainer.models import TransformerLM
from llm_trainer.tokenizer import Tokenizer
from llm_trainer.training.utils import setup_logging


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a text is continued; `TransformerLM.generate` says what the fields mean."""

    max_length: int = 100
    max_new_tokens: int | None = None
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0


def continue_ids(
    model: TransformerLM,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampling: Sampling,
    generator: torch.Generator | None,
) -> list[int]:
    """Return the ids of a prompt and of its continuation, which ends where the text does.

    Raises:
        GenerationError: A field of `sampling` is impossible, or the prompt leaves no room.
    """
    produced = model.generate(
        torch.tensor([list(prompt)], device=model.embedding.weight.device),
        **asdict(sampling),
        do_sample=sampling.temperature > 0,
        eos_token_id=tokenizer.eos_token_id,
        generator=generator,
    )
    return [int(token) for token in produced[0]]


def generate_texts(
    model_path: Path,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    prompts_file: Path | None,
    seed: int | None,
    interactive: bool,
    output_path: Path | None,
    device: str | None,
    log_level: str,
) -> None:
    """Continue prompts, print the texts, and write them if asked to.

    Raises:
        ConfigurationError: There is no model.
        DataError: The file of prompts is not text, or holds none.
        GenerationError: A parameter is impossible, or a prompt leaves no room.
    """
    setup_logging(log_level)
    wanted = [*prompts, *([] if prompts_file is None else _read_prompts(prompts_file))]
    place = pick_device(device)
    model, tokenizer = load_model(model_path, place)
    generator = None if seed is None else torch.Generator(place).manual_seed(seed)

    def complete(prompt: str) -> str:
        return tokenizer.decode(continue_ids(model, tokenizer, tokenizer.encode(prompt), sampling, generator))

    results: list[dict[str, str]] = []
    for number, prompt in enumerate(wanted):
        if number:
            typer.echo("---")
        text = complete(prompt)
        typer.echo(text)
        results.append({"prompt": prompt, "text": text})
    if interactive:
        _converse(complete, results)
    if output_path is not None:
        write_json(
            output_path,
            {"model": str(model_path), "seed": seed, "sampling": asdict(sampling), "texts": results},
        )


def _converse(complete: Callable[[str], str], results: list[dict[str, str]]) -> None:
    sign = "> " if sys.stdin.isatty() else ""
    try:
        while True:
            prompt = input(sign)
            if not prompt.strip():
                continue
            try:
                text = complete(prompt)
            except GenerationError as error:
                typer.echo(f"llm-trainer: {error}", err=True)
                continue
            typer.echo(text)
            sys.stdout.flush()
            results.append({"prompt": prompt, "text": text})
    except (EOFError, KeyboardInterrupt):
        if sign:
            typer.echo()


def _read_prompts(path: Path) -> list[str]:
    try:
        prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}.") from error
    if not prompts:
        raise DataError(f"{path} holds no prompt; write one on each line.")
    return prompts
