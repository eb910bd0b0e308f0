"""How near a model's outputs are to those of the original."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hamerspace.models.info import Array, Feeds


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Outputs compared with those of the original on the same inputs."""

    cosine: float
    """Mean over samples of the cosine between the outputs, all outputs of a sample taken as one vector."""
    sqnr_db: float
    """Energy of the original's outputs over that of the difference, in decibels; inf where there is none."""
    agreement: float | None
    """Share of samples (or positions) with the same largest entry, where the first output looks like
    scores."""
    samples: int
    basis: str
    """What the inputs were."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def __str__(self) -> str:
        agreement = "" if self.agreement is None else f", {self.agreement:.1%} the same top output"
        return (
            f"cosine {self.cosine:.4f}, SQNR {self.sqnr_db:.1f} dB{agreement} on {self.samples} {self.basis}"
        )


def compare(
    original: Sequence[Feeds], other: Sequence[Feeds], basis: str, axes: Mapping[str, int] | None = None
) -> Fidelity:
    """Compare outputs batch by batch.

    Args:
        original: outputs of the original.
        other: outputs of the other model on the same inputs.
        basis: what the inputs were, for people.
        axes: of the samples, by output, where they are not the first. The first output says how many samples
            there are; one that has another number of them is of all samples together.

    Raises:
        ValueError: a shape differs, or the other gives NaN or infinity where the original does not.
    """
    signal, noise = 0.0, 0.0
    places = axes or {}
    dots: list[Array] = []
    norms: list[Array] = []
    others: list[Array] = []
    same: list[Array] = []
    for wanted, found in zip(original, other, strict=True):
        total: list[Array] = [np.zeros(1), np.zeros(1), np.zeros(1)]
        first = next(iter(wanted))
        samples = len(_by_sample(wanted[first], places.get(first, 0)))
        for name, reference in wanted.items():
            a, b = _checked(name, reference, found.get(name), places.get(name, 0))
            if len(a) != samples:
                a, b = a.reshape(1, -1), b.reshape(1, -1)
            signal += float((a * a).sum())
            noise += float(((a - b) ** 2).sum())
            total = [total[0] + (a * b).sum(1), total[1] + (a * a).sum(1), total[2] + (b * b).sum(1)]
        dots.append(total[0])
        norms.append(total[1])
        others.append(total[2])
        if (agreed := _agreement(wanted[first], found[first])) is not None:
            same.append(agreed)
    dot, norm, other_norm = (np.concatenate(parts) for parts in (dots, norms, others))
    both_zero = (norm == 0) & (other_norm == 0)
    cosine = np.where(both_zero, 1.0, dot / np.sqrt(np.maximum(norm * other_norm, 1e-60)))
    ratio = float("inf") if noise == 0 else 10 * np.log10(max(signal, 1e-60) / noise)
    agreement = float(np.concatenate(same).mean()) if same else None
    return Fidelity(
        cosine=float(cosine.mean()), sqnr_db=float(ratio), agreement=agreement, samples=len(norm), basis=basis
    )


def largest_difference(wanted: Feeds, found: Feeds) -> float:
    """Largest difference of any output, as a share of that output's largest magnitude.

    Raises:
        ValueError: a shape differs, or one is not finite where the other is.
    """
    worst = 0.0
    for name, reference in wanted.items():
        a, b = _checked(name, reference, found.get(name))
        if a.size:
            worst = max(worst, float(np.abs(a - b).max() / max(float(np.abs(a).max()), 1e-30)))
    return worst


def _by_sample(array: Array, axis: int) -> Array:
    """Return an array in float64 with a row a sample; what has no such axis is one row."""
    if array.dtype.kind == "c":
        array = np.stack([np.real(array), np.imag(array)], -1)
    whole = np.asarray(array, np.float64)
    if whole.ndim <= axis:
        return whole.reshape(1, -1)
    return np.moveaxis(whole, axis, 0).reshape(whole.shape[axis], -1)


def _checked(name: str, reference: Array, other: Array | None, axis: int = 0) -> tuple[Array, Array]:
    """Return two outputs as float64 with a row a sample, zero where both are not finite."""
    if other is None:
        raise ValueError(f"output {name!r} is missing")
    if other.shape != reference.shape:
        raise ValueError(
            f"output {name!r} has the shape {list(other.shape)} in place of {list(reference.shape)}"
        )
    a, b = _by_sample(reference, axis), _by_sample(other, axis)
    odd = ~np.isfinite(b) & np.isfinite(a)
    if odd.any():
        raise ValueError(
            f"output {name!r} is NaN or infinite in {int(odd.sum())} places where the original is not"
        )
    both = np.isfinite(a) & np.isfinite(b)
    return np.where(both, a, 0.0), np.where(both, b, 0.0)


def _agreement(wanted: Array, found: Array) -> Array | None:
    if wanted.ndim != 2 or wanted.dtype.kind != "f" or not 2 <= wanted.shape[1] <= 200_000:
        return None
    return wanted.argmax(1) == found.argmax(1)


def checked_score(value: Any) -> float:
    """Return what ``validation_fn`` returned as a number.

    Raises:
        ValueError: it is none, or not finite.
    """
    score = float(value)
    if not math.isfinite(score):
        raise ValueError(f"validation_fn returned {score}; it has to return a finite number")
    return score


def accuracy(outputs: Sequence[Feeds], labels: Sequence[Array]) -> float:
    """Share of labels that the largest entry of the first output meets.

    Labels are class numbers, of one axis less than the output, or one-hot.

    Raises:
        ValueError: labels do not fit the output.
    """
    hits, total = 0, 0
    for found, wanted in zip(outputs, labels, strict=True):
        scores = next(iter(found.values()))
        classes = wanted
        if wanted.shape == scores.shape and wanted.ndim > 1 and scores.shape[-1] > 1:
            classes = wanted.argmax(-1)
        elif wanted.ndim == scores.ndim and wanted.shape[-1] == 1:
            classes = wanted[..., 0]
        if classes.shape != scores.shape[:-1] or scores.shape[-1] < 2 or classes.dtype.kind not in "iub":
            raise ValueError(
                f"labels of the shape {list(wanted.shape)} and dtype {wanted.dtype} do not name classes of "
                f"an output of the shape {list(scores.shape)}; give validation_fn, which measures accuracy "
                "your way"
            )
        hits += int((scores.argmax(-1) == classes).sum())
        total += classes.size
    return hits / max(1, total)
