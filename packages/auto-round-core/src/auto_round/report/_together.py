"""What the page says of the training of all scales together: a sentence and the losses of its steps."""

from __future__ import annotations

from auto_round._text import count, figure, recovered
from auto_round.quantization._report import EndToEndReport
from auto_round.report._plot import UNITS, Axis, around, dots, drawable, framed, line, round_values
from auto_round.report._steps import thinned

_BUCKETS = 300


def together_sentence(report: EndToEndReport | None) -> list[str]:
    """Return what came of it in one sentence; nothing where it was not done."""
    if report is None:
        return []
    on = f"{count(report.samples, 'sample')}{' held out for that' if report.held_out else ''}"
    share = recovered(report.loss_before, report.loss_after)
    if report.best_step == 0 or share is None:
        return [
            "Training all scales together did not bring predictions nearer to the float model's, measured "
            f"on {on}: the scales are as they were."
        ]
    return [
        f"Training all scales together took the predictions' divergence from the float model's from "
        f"{figure(report.loss_before)} to {figure(report.loss_after)} nats a token ({share:.1%} less), "
        f"measured on {on}."
    ]


def together_section(report: EndToEndReport | None) -> str:
    """Return the losses of the steps with an explanation; nothing where there are none to be drawn."""
    losses = () if report is None else report.step_losses
    steps = [(step, loss) for step, loss in enumerate(losses) if drawable(loss)]
    if report is None or not steps:
        return ""
    measured = [
        (step, loss, style)
        for step, loss, style in (
            (0, report.loss_before, "before"),
            (report.best_step, report.loss_after, "after"),
        )
        if drawable(loss)
    ]
    ordered = sorted(loss for _, loss in steps)
    extreme = len(ordered) // 200
    y = around([ordered[extreme], ordered[-1 - extreme], *(loss for _, loss, _ in measured)])
    last = max(len(losses), 1)
    x = Axis(0.0, last, tuple((tick, f"{tick:,.0f}") for tick in round_values(0, last, 5) if tick % 1 == 0))

    def place(step: float, loss: float) -> tuple[float, float]:
        return x.place(step), UNITS - y.place(loss)

    ends, means = thinned(steps, _BUCKETS)
    body = (
        f'<path class="faint" d="{line([place(*one) for one in ends])}"/>'
        f'<path class="line" d="{line([place(*one) for one in means])}"/>'
    )
    for step, loss, style in measured:
        body += f'<path class="dots {style}" d="{dots([place(step, loss)])}"/>'
    pair = f"{figure(report.loss_before)} to {figure(report.loss_after)}"
    label = f"Divergence by step of training all scales, measured from {pair} nats a token"
    held = "samples that were held out" if report.held_out else "all samples"
    text = (
        "Kullback-Leibler divergence of the quantised model's predictions of the next token from the float "
        "model's, in nats a token: thin lines join single steps' batches, or the extremes of several, the "
        f"bold one their means. The dots are measured on {held}: before, and with the scales that were kept. "
        "The losses of blocks and the layers' SQNR on this page are those before this training."
    )
    return f'<p class="soft">{text}</p>{framed(body, x=x, y=y, label=label)}'
