"""Loss curves, and the page of a run."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llm_trainer._files import write_atomically, write_text
from llm_trainer.exceptions import ConfigurationError
from llm_trainer.training._history import TrainingHistory
from llm_trainer.training._report_page import report_html

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["loss_curve_svg", "save_loss_curve", "save_run_report"]


# Stands for the colour of the text around, which matplotlib has no name for.
_TEXT_COLOUR = "#010203"


def _draw(history: TrainingHistory, ink: str = "black") -> Figure:
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
            # A line through one point shows nothing.
            axes.plot(steps, values, "o-" if len(values) == 1 else style, label=label, markersize=4)
    axes.set_xlabel("step", color=ink)
    axes.set_ylabel("loss (nats a token)", color=ink)
    axes.tick_params(colors=ink)
    axes.spines[:].set_color(ink)
    axes.grid(alpha=0.3)
    if history.train_losses or history.eval_losses:
        axes.legend(labelcolor=ink, framealpha=0)
    return figure


def loss_curve_svg(history: TrainingHistory) -> str:
    """Return the losses over the steps as an SVG document.

    Its background is clear and its text has the colour of the text around it, so that it can stand in a
    page of any theme.
    """
    buffer = io.StringIO()
    _save(_draw(history, _TEXT_COLOUR), buffer, "svg", transparent=True)
    return buffer.getvalue().replace(_TEXT_COLOUR, "currentColor")


def save_loss_curve(history: TrainingHistory, path: str | Path) -> None:
    """Draw the losses over the steps into a `.png` or `.svg` file, or write the `.html` page of a run.

    Raises:
        ConfigurationError: The ending is another one.
    """
    target = Path(path)
    kind = target.suffix.removeprefix(".")
    if kind == "html":
        save_run_report(history, target)
        return
    if kind not in {"png", "svg"}:
        raise ConfigurationError(f"{target} must end in .html, .png or .svg.")
    figure = _draw(history)
    write_atomically(target, lambda temporary: _save(figure, temporary, kind))


def save_run_report(
    history: TrainingHistory,
    path: str | Path,
    *,
    title: str = "Training run",
    settings: Mapping[str, Any] | None = None,
    resumed_after: Sequence[int] = (),
) -> None:
    """Write one page with a summary, curves over steps, tokens or time, the evaluations and the settings.

    It is a file of its own that loads nothing, follows the reader's light or dark theme, fits a phone, and
    can be read without a script. A long run is thinned to what a screen shows; no lowest or highest value is
    lost.

    Args:
        history: What happened.
        path: An `.html` file.
        title: Heading of the page.
        settings: Values by name, or groups of them, such as `{"training": config.to_dict()}`.
        resumed_after: The steps after which the run went on in another sitting.
    """
    page = report_html(history, title=title, settings=settings, resumed_after=resumed_after)
    write_text(Path(path), page)


def _save(figure: Figure, target: io.StringIO | Path, kind: str, *, transparent: bool = False) -> None:
    # Without the date, equal histories give equal files.
    metadata = {"Date": None} if kind == "svg" else None
    cast("Any", figure).savefig(target, format=kind, dpi=150, metadata=metadata, transparent=transparent)
