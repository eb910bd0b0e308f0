"""Whose text is calibrated with: the user's, the float model's own, or both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from auto_round.config_manager import QuantizationConfig
from auto_round.exceptions import ConfigurationError
from auto_round.quantization._calibration import calibration_tokens
from auto_round.quantization._experts import FewShapes
from auto_round.quantization._self_written import self_written_tokens


def calibration_sequences(
    model: Any,
    tokenizer: Any,
    data: object,
    settings: QuantizationConfig,
    *,
    vocab_size: int | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Return the sequences that `settings.calibration` asks for: user, self or mixed.

    Mixed takes half of the rows, rounded up, from the user's data and lets the model write the others. They
    lie in turns, so that any run of rows holds both. The user's data is read first: what is wrong with it
    shows before the model is run at all.

    Args:
        model: The float model; not touched with `user`. See `self_written_tokens`.
        tokenizer: See `calibration_tokens` and `self_written_tokens`.
        data: The user's; see `calibration_tokens`. None with `self`.
        settings: `calibration`, `nsamples`, `seqlen` and `seed` are read.
        vocab_size: Tokens that the model knows; None takes the tokenizer's or the configuration's number.
        batch_size: Rows that the model writes at once; None means all.
        device: Where the model takes its ids; see `self_written_tokens`.
        progress: Called with the tokens that the model has written, and will have.

    Returns:
        int64 [nsamples, seqlen] on the CPU; fewer rows, with a warning, where the user's data has no more.

    Raises:
        ConfigurationError: Data are given with `self`, or `nsamples` is 1 with `mixed`.
        CalibrationError, MissingPackageError: As `calibration_tokens` and `self_written_tokens` raise them.
    """
    size: dict[str, Any] = {"seqlen": settings.seqlen, "seed": settings.seed, "vocab_size": vocab_size}
    own = {"user": 0, "self": settings.nsamples, "mixed": settings.nsamples // 2}[settings.calibration]
    if settings.calibration == "self" and data is not None:
        raise ConfigurationError(
            "quantization.calibration is 'self', which reads no data, but calibration data was given; set it "
            "to 'mixed' or 'user', or give no data."
        )
    if settings.calibration == "mixed" and not own:
        raise ConfigurationError(
            "quantization.calibration is 'mixed' with quantization.nsamples 1, of which there is no half; "
            "set nsamples to at least 2."
        )
    parts: list[Tensor] = []
    if own < settings.nsamples:
        parts.append(calibration_tokens(data, tokenizer, nsamples=settings.nsamples - own, **size))
    if own:
        with FewShapes():
            written = self_written_tokens(
                model,
                tokenizer=tokenizer,
                nsamples=own,
                batch_size=batch_size,
                device=device,
                progress=progress,
                **size,
            )
        parts.append(written)
    order = torch.cat([torch.arange(len(part)) for part in parts]).argsort(stable=True)
    return torch.cat(parts)[order]
