"""Groups: the runs of weights along a row that share a scale."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from auto_round.exceptions import ConfigurationError, QuantizationError

_CHUNK = 1 << 20
_USUAL_SIZES = (16, 32, 64, 128, 256, 512, 1024)


def grouped(weight: Tensor, group_size: int) -> Tensor:
    """Return a view `[out, groups, size]` of a matrix `[out, in]` of any dtype.

    `group_size` -1 makes one group of each row.

    Raises:
        QuantizationError: `weight` is no matrix, or its rows are empty.
        ConfigurationError: The groups do not divide the rows. Nothing is padded: the formats that are
            exported have no place for a group that is cut short.
    """
    if weight.ndim != 2 or weight.shape[1] == 0:
        raise QuantizationError(
            f"weights of shape {list(weight.shape)} have no rows to group; give a matrix [out, in] with "
            "columns."
        )
    width = weight.shape[1]
    size = width if group_size == -1 else group_size
    if size < 1 or width % size:
        fitting = [str(usual) for usual in _USUAL_SIZES if width % usual == 0] + ["-1 (one group a row)"]
        raise ConfigurationError(
            f"group_size {group_size} does not divide rows of {width} weights; it may be "
            f"{', '.join(fitting)}."
        )
    return weight.view(weight.shape[0], width // size, size)


def row_chunks(rows: int, width: int, most: int = _CHUNK) -> Iterator[slice]:
    """Yield slices that cover `rows` in order, of at most `most` elements (at least one row) each.

    What works on one slice at a time needs memory for a slice, however large the matrix is.
    """
    step = max(1, most // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))
