"""Loss curves."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llm_trainer._files import write_atomically
from llm_trainer.exceptions import ConfigurationError
from llm_trainer.training._history import TrainingHistory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["loss_curve_svg", "save_loss_curve"]


def _draw(history: TrainingHistory) -> Figure:
    # matplotlib takes a second to load, and a figure of its own leaves pyplot's global state alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = cast("Any", figure.add_subplot())
    for losses, label, style in (
        (history.train_losses, "training", "-"),
        (history.eval_losses, "held out", "o-"),
    ):
        if losses:
            steps, values = zip(*losses, strict=True)
            axes.plot(steps, values, style, label=label, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    if history.train_losses or history.eval_losses:
        axes.legend()
    return figure


def loss_curve_svg(history: TrainingHistory) -> str:
    """Return the losses over the steps as an SVG document."""
    buffer = io.StringIO()
    _save(_draw(history), buffer, "svg")
    return buffer.getvalue()


def save_loss_curve(history: TrainingHistory, path: str | Path) -> None:
    """Draw the losses over the steps into a `.png` or `.svg` file.

    Raises:
        ConfigurationError: The ending is another one.
    """
    target = Path(path)
    kind = target.suffix.removeprefix(".")
    if kind not in {"png", "svg"}:
        raise ConfigurationError(f"{target} must end in .png or .svg.")
    figure = _draw(history)
    write_atomically(target, lambda temporary: _save(figure, temporary, kind))


def _save(figure: Figure, target: io.StringIO | Path, kind: str) -> None:
    # Without the date, equal histories give equal files.
    metadata = {"Date": None} if kind == "svg" else None
    cast("Any", figure).savefig(target, format=kind, dpi=150, metadata=metadata)
