"""What `llm-trainer train` does."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import av_memory
import torch
import typer
from torch import Tensor

from llm_trainer.cli._models import available_bytes, pick_device
from llm_trainer.cli._settings import save_run
from llm_trainer.cli._table import duration, print_table
from llm_trainer.cli._tokenizers import tokenizer_of
from llm_trainer.config import ModelConfig, RunConfig, calculate_parameters, estimate_memory_usage
from llm_trainer.data import LanguageModelingDataset, create_dataloader, load_splits
from llm_trainer.data._splits import checked_sources, held_out
from llm_trainer.exceptions import CheckpointError, ConfigurationError
from llm_trainer.models import TransformerLM
from llm_trainer.models._compile import check_compiler
from llm_trainer.models._model_files import read_model
from llm_trainer.tokenizer import Tokenizer, load_tokenizer
from llm_trainer.training import Trainer, set_seed
from llm_trainer.training._checkpoints import check, find
from llm_trainer.training._checks import check_evaluations, configured_callbacks
from llm_trainer.training._precision import Precision
from llm_trainer.training.loggers import create_loggers
from llm_trainer.training.utils import setup_logging
from llm_trainer.utils.metrics import batch_loss, bits_per_byte, perplexity_of

_logger = logging.getLogger(__name__)
_GIB = 2**30


def train_run(
    run: RunConfig, *, force_tokenizer: bool, device: str | None, dry_run: bool, log_level: str
) -> None:
    """Check everything, train, save the model beside its tokenizer, and print a summary.

    Raises:
        ConfigurationError: Something does not fit together; before any long work.
        LLMTrainerError: As `Trainer.train_from_config` says.
        KeyboardInterrupt: After a checkpoint.
        SystemExit: After a checkpoint, with code 143.
    """
    setup_logging(log_level)
    place = pick_device(device)
    output = Path(str(run.training.output_dir))
    if output.exists() and not output.is_dir():
        raise ConfigurationError(f"{output} is a file; --output-dir takes a folder.")
    checkpoint = _checkpoint_to_resume(run)
    if checkpoint is not None and force_tokenizer:
        _logger.warning("The tokenizer is not trained again: a resumed run keeps the one in its checkpoint.")
    _check_settings(run, output, place)
    checked_sources(run.data)
    _check_memory(run.model, place)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = (
        tokenizer_of(run.data, output / "tokenizer", force=force_tokenizer)
        if checkpoint is None
        else load_tokenizer(checkpoint)
    )
    resume = None if checkpoint is None else str(checkpoint)
    run = RunConfig(
        dataclasses.replace(run.model, vocab_size=tokenizer.vocab_size),
        dataclasses.replace(run.training, resume_from_checkpoint=resume),
        run.data,
    )
    set_seed(run.training.seed)
    model = TransformerLM(run.model).to(place)
    if dry_run:
        print_table("Ready to train; nothing was trained", _rehearse(run, model, tokenizer, place))
        return
    if resume is None and (output / "history.jsonl").exists():
        _logger.warning(
            "%s holds an earlier run, whose curves and model are replaced; --resume-from-checkpoint latest "
            "would go on with it.",
            output,
        )
    save_run(run, output / "config.yaml")
    trainer = Trainer(model, tokenizer, run.training, device=place)
    with _telling_how_to_go_on(output):
        trainer.train_from_config(run.model, run.data)
    trainer.save_model(output)
    _summarise(trainer, output)


def _checkpoint_to_resume(run: RunConfig) -> Path | None:
    resume = run.training.resume_from_checkpoint
    if resume is None:
        return None
    if resume != "latest" and not Path(resume).is_dir():
        raise ConfigurationError(f"There is no checkpoint {resume}; give its folder, or latest.")
    folder = run.training.checkpoint_dir
    checkpoint = find(resume, None if folder is None else Path(folder))
    if checkpoint is not None:
        found, _ = read_model(checkpoint)
        # The run's tokenizer, which decides on the size of the vocabulary, is in the checkpoint.
        wanted = dataclasses.replace(run.model, vocab_size=found.vocab_size)
        try:
            check(checkpoint, wanted, run.training, configured_callbacks(run.training))
        except CheckpointError as error:
            # It is whole: what does not fit is the configuration.
            raise ConfigurationError(str(error)) from error
    return checkpoint


def _check_settings(run: RunConfig, output: Path, device: torch.device) -> None:
    """Find what `Trainer` would refuse, before there is a tokenizer to give it."""
    training = run.training
    create_loggers(training.report_to, output, training.run_name)
    check_evaluations(training, configured_callbacks(training), has_rows=held_out(run.data) is not None)
    if training.compile_model:
        check_compiler(device)


def _check_memory(model: ModelConfig, device: torch.device) -> None:
    needed, available = estimate_memory_usage(model), available_bytes(device)
    if available is not None and needed > available / _GIB:
        raise ConfigurationError(
            f"The model of {calculate_parameters(model) / 1e6:,.0f}M parameters needs {needed:.1f} GB for "
            f"weights, gradients and optimizer, and {available / _GIB:.1f} GB are available on {device}; "
            "choose a smaller one."
        )


def _rehearse(
    run: RunConfig, model: TransformerLM, tokenizer: Tokenizer, device: torch.device
) -> dict[str, object]:
    """Prepare the rows, pass one batch forward and back, and tell what the run will take."""
    training = run.training
    splits = load_splits(run.data, tokenizer, cache_dir=Path(str(training.output_dir)) / "data")
    loader = create_dataloader(splits.train, training.batch_size, seed=training.seed)
    in_epoch = math.ceil(len(loader) / training.gradient_accumulation_steps)
    steps = training.max_steps or in_epoch * training.num_epochs
    batch = next(iter(loader))
    precision = Precision(training, device)
    model.train()
    with av_memory.MemoryTracker("dry run", high_water=True) as tracker:
        # The first pass prepares what the later ones use again.
        _, pass_s = (_pass_s(model, batch, precision, device) for _ in range(2))
    # Of what training holds, only the optimizer's two moments are not there yet.
    moments = 8 * calculate_parameters(run.model)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) + moments
    else:
        peak = round(tracker.result.cpu.peak_mb * 2**20) + moments
    available = available_bytes(device)
    if available is not None and peak > available + av_memory.get_cpu_memory() * 2**20:
        raise ConfigurationError(
            f"A step needs about {peak / _GIB:.1f} GB, and {available / _GIB:.1f} GB are available on "
            f"{device}; use a smaller batch_size with more gradient_accumulation_steps."
        )
    step_s = pass_s * training.gradient_accumulation_steps
    stats = splits.train.get_stats()
    held_out = None if splits.validation is None else splits.validation.get_stats()
    return {
        "parameters": calculate_parameters(run.model),
        "vocabulary": tokenizer.vocab_size,
        "text to train on": f"{stats['num_documents']:,} documents, {stats['num_tokens']:,} tokens, "
        f"{stats['num_rows']:,} rows of {run.data.max_length}",
        "text to evaluate on": None
        if held_out is None
        else f"{held_out['num_documents']:,} documents, {held_out['num_tokens']:,} tokens",
        "steps": steps,
        "passes over the text": steps / in_epoch,
        "tokens a step": training.effective_batch_size * run.data.max_length,
        "device": str(device),
        "memory": f"about {peak / _GIB:.2f} GB"
        + ("" if available is None else f"; {available / _GIB:.2f} GB are available"),
        "time": f"about {duration(steps * step_s)} at {step_s:.2f} s a step, without evaluations",
    }


def _pass_s(
    model: TransformerLM, batch: dict[str, Tensor], precision: Precision, device: torch.device
) -> float:
    started = time.perf_counter()
    with precision.autocast():
        loss = batch_loss(model, batch, device)
    torch.autograd.backward(loss)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


@contextmanager
def _telling_how_to_go_on(output: Path) -> Generator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        typer.echo(
            f"To go on: llm-trainer train --config {output / 'config.yaml'} --resume-from-checkpoint latest",
            err=True,
        )
        raise


def _summarise(trainer: Trainer, output: Path) -> None:
    history = trainer.history
    last = history.records[-1]
    data = trainer.eval_dataset if history.eval_losses else trainer.train_dataset
    place = "held-out" if history.eval_losses else "the training"
    _, loss = (history.eval_losses or history.train_losses or [(0, math.nan)])[-1]
    bits = bits_per_byte(loss, data) if isinstance(data, LanguageModelingDataset) else None
    print_table(
        "Trained",
        {
            "loss": f"{loss:.4f} nats a token, on {place} text",
            "perplexity": perplexity_of(loss),
            "bits per byte": bits,
            "steps": last.step,
            "tokens": last.tokens,
            "skipped steps": last.skipped_steps or None,
            "time": f"{duration(last.wall_s)}, {last.tokens_per_s:,.0f} tokens/s",
            "parameters": trainer.model.get_num_params(),
            "model": output,
            "checkpoints": trainer.config.checkpoint_dir,
            "report": output / "report.html",
        },
    )
