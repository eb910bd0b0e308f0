"""Token ids that somebody else made: checked, and cut to the tokens that are no padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from auto_round._files import shown
from auto_round.exceptions import CalibrationError


def rows_of(value: object, label: str, *, vocab_size: int | None) -> list[Tensor]:
    """Return the rows of token ids in `value`: int64 [length] each, on the CPU, without padding.

    Args:
        value: Ids [length] or [rows, length] as tensor, array or list of any integer dtype, or a mapping with
            those under `input_ids` and, where rows are padded, an `attention_mask` of the same shape.
        label: What an error calls it.
        vocab_size: Ids must be below it; None checks no more than that none is negative.

    Raises:
        CalibrationError: Ids are no integers, are outside the vocabulary, or do not fit their mask.
    """
    mask = None
    if isinstance(value, Mapping):
        fields = cast("Mapping[str, object]", value)
        ids = _integers(fields["input_ids"], label)
        if fields.get("attention_mask") is not None:
            mask = _integers(fields["attention_mask"], f"The attention mask of {label}", flags=True)
            if mask.shape != ids.shape:
                raise CalibrationError(
                    f"{label} has token ids of shape {list(ids.shape)} and an attention mask of shape "
                    f"{list(mask.shape)}; they must be the same."
                )
    else:
        ids = _integers(value, label)
    if ids.dim() not in (1, 2):
        raise CalibrationError(
            f"{label} has token ids of shape {list(ids.shape)}; give [length] or [rows, length]."
        )
    rows = _as_rows(ids)
    if mask is not None:
        rows = [row[kept != 0] for row, kept in zip(rows, _as_rows(mask), strict=True)]
    for row in rows:
        _check_range(row, label, vocab_size)
    return rows


def _as_rows(ids: Tensor) -> list[Tensor]:
    return [ids] if ids.dim() == 1 else list(ids.unbind())


def _integers(value: object, label: str, *, flags: bool = False) -> Tensor:
    if isinstance(value, Tensor):
        fractions = value.is_floating_point() or value.is_complex()
        is_plain = value.layout is torch.strided and not (value.is_meta or value.is_nested)
        if not is_plain or fractions or (value.dtype == torch.bool and not flags):
            raise _no_integers(label, f"a tensor of {value.dtype} on {value.device}, {value.layout}")
        return value.detach().to("cpu", torch.int64)
    try:
        array: np.ndarray[Any, Any] = np.asarray(value)
    except (ValueError, TypeError, OverflowError) as failure:
        raise _no_integers(label, f"{shown(value)} ({failure})") from None
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype.kind not in ("iub" if flags else "iu") or (
        array.dtype == np.uint64 and array.max() >= 2**63
    ):
        raise _no_integers(label, f"{array.dtype}, such as {shown(array.ravel().tolist()[0])}")
    return torch.from_numpy(array.astype(np.int64, order="C"))  # pyright: ignore[reportUnknownMemberType]


def _no_integers(label: str, what: str) -> CalibrationError:
    return CalibrationError(f"{label} must hold token ids, which are whole numbers, but holds {what}.")


def _check_range(row: Tensor, label: str, vocab_size: int | None) -> None:
    if row.numel() == 0:
        return
    least, most = (int(bound) for bound in torch.aminmax(row))
    if least < 0 or (vocab_size is not None and most >= vocab_size):
        wrong = least if least < 0 else most
        place = int((row == wrong).nonzero()[0])
        allowed = "0 or more" if vocab_size is None else f"0 to {vocab_size - 1}"
        raise CalibrationError(
            f"{label} holds the token id {wrong} at place {place}, but ids are {allowed}. Padding is marked "
            "by an attention_mask; if the ids are right otherwise, they come from another tokenizer."
        )
