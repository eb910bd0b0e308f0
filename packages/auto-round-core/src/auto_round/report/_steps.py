"""How each block's loss went from step to step: one small drawing a block, all on one axis."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from statistics import fmean

from auto_round._text import printable
from auto_round.quantization._report import BlockReport
from auto_round.report._plot import UNITS, Axis, around, dots, drawable, framed, line
from auto_round.report._tables import fitting

_MOST_POINTS = 24_000
_MOST_BUCKETS = 60
_MOST_DRAWINGS = 300
_MOST_BYTES = 400_000
_LONGEST_NAME = 24


def step_charts(blocks: Sequence[BlockReport]) -> tuple[str, int]:
    """Return a drawing for each block that was trained, and how many blocks there was no room for.

    A thin line joins the losses of the batches, or the lowest and highest of many steps; a bold one joins
    means. The axis holds all but the most extreme hundredth of the losses, and those are at its ends.
    """
    trained = [block for block in blocks if any(map(drawable, block.step_losses))]
    shown = trained[:_MOST_DRAWINGS]
    if not shown:
        return "", 0
    losses = sorted(loss for block in shown for loss in block.step_losses if drawable(loss))
    extreme = len(losses) // 200
    y = around([losses[extreme], losses[-1 - extreme], 1.0], most=3)
    y = Axis(y.low, y.high, tuple((value, f"{100 * value:.6g}%") for value, _ in y.ticks))
    buckets = min(max(_MOST_POINTS // (3 * len(shown)), 8), _MOST_BUCKETS)
    drawings = fitting([_drawing(block, y, buckets) for block in shown], _MOST_BYTES)
    return "".join(drawings), len(trained) - len(drawings)


def _drawing(block: BlockReport, y: Axis, buckets: int) -> str:
    steps = [(step, loss) for step, loss in enumerate(block.step_losses) if drawable(loss)]
    x = Axis(0.0, max(len(block.step_losses) - 1, 1))

    def place(step: float, loss: float) -> tuple[float, float]:
        return x.place(step), UNITS - y.place(loss)

    ends, means = thinned(steps, buckets)
    body = (
        f'<path class="part" d="M0 {UNITS - y.place(1.0):.0f}h{UNITS}"/>'
        f'<path class="faint" d="{line([place(*one) for one in ends])}"/>'
        f'<path class="line" d="{line([place(*one) for one in means])}"/>'
    )
    kept = ""
    if block.best_step is not None:
        kept = f"step {block.best_step:,} kept"
        best = [place(step, loss) for step, loss in steps if step == block.best_step]
        body += f'<path class="dots top" d="{dots(best)}"/>'
    name = printable(block.name, 120)
    # Names of blocks differ at their ends.
    short = name if len(name) <= _LONGEST_NAME else f"...{name[3 - _LONGEST_NAME :]}"
    first, last = means[0][1], means[-1][1]
    label = f"Losses of {name}, from {first:.1%} to {last:.1%} of rounding to nearest; {kept}"
    return (
        f'<figure><figcaption><b title="{escape(name)}">{escape(short)}</b> <span>{kept}</span></figcaption>'
        f"{framed(body, x=x, y=y, label=label, style='small')}</figure>"
    )


def thinned(
    steps: Sequence[tuple[int, float]], buckets: int
) -> tuple[list[tuple[int, float]], list[tuple[float, float]]]:
    """Return the lowest and highest loss of each of so many stretches of steps, and means."""
    length = -(-len(steps) // buckets)
    stretches = [steps[start : start + length] for start in range(0, len(steps), length)]
    ends: list[tuple[int, float]] = []
    for stretch in stretches:
        ends += sorted({min(stretch, key=lambda step: step[1]), max(stretch, key=lambda step: step[1])})
    # Losses of batches are noisy, and a mean of few steps is as well.
    wide = -(-len(steps) // min(buckets, 20))
    means = [
        (fmean(step for step, _ in some), fmean(loss for _, loss in some))
        for some in (steps[start : start + wide] for start in range(0, len(steps), wide))
    ]
    return ends, means
