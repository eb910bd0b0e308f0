"""A run on one page that needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any, cast

from llm_trainer.training._history import HistoryRecord, TrainingHistory
from llm_trainer.training._progress import format_duration
from llm_trainer.training._report_charts import AXES, chart_html, charts_of, compact, page_data, readable
from llm_trainer.utils.metrics import perplexity_of

_MOST_EVALUATIONS = 200

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src '$script_hash'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header><h1>$title</h1><p class="summary">$summary</p></header>
<main>
$charts
$evaluations
$settings
</main>
<script type="application/json" id="data">$data</script>
<script>$script</script>
</body>
</html>
""")


def report_html(
    history: TrainingHistory,
    *,
    title: str = "Training run",
    settings: Mapping[str, Any] | None = None,
    resumed_after: Sequence[int] = (),
) -> str:
    """Return the page: a summary, the curves, the evaluations and the settings."""
    charts = charts_of(history)
    script = _asset("report_page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = json.dumps(page_data(history, charts), separators=(",", ":"), allow_nan=False)
    drawn = "".join(chart_html(history, chart, number, resumed_after) for number, chart in enumerate(charts))
    page = _PAGE.substitute(
        script_hash=f"sha256-{digest}",
        title=escape(title),
        style=_asset("report_page.css"),
        summary=escape(" ".join(summary(history, resumed_after))),
        charts=f'{_controls()}<div class="charts">{drawn}</div>' if charts else "",
        evaluations=_evaluations(history),
        settings=_settings(settings or {}),
        # Whatever a label may become, it does not end the element.
        data=data.replace("<", "\\u003c"),
        script=script,
    )
    # A setting may hold half of a surrogate pair, which no encoding can.
    return page.encode("utf-8", "replace").decode("utf-8")


def summary(history: TrainingHistory, resumed_after: Sequence[int] = ()) -> list[str]:
    """Return the run in sentences."""
    if not len(history):
        return ["Nothing has been recorded yet."]
    last = history.records[-1]
    sentences = [
        f"{_count(last.step, 'step')} over {_count(last.tokens, 'token')} in {format_duration(last.wall_s)}, "
        f"{last.tokens_per_s:,.0f} tokens a second."
    ]
    if history.train_losses:
        sentences.append(f"The training loss ended at {history.train_losses[-1][1]:.4f} nats a token.")
    if history.eval_losses:
        step, loss = history.eval_losses[-1]
        sentences.append(
            f"The held-out loss ended at {loss:.4f} (perplexity {readable(perplexity_of(loss))})"
            + _lowest(history.eval_losses, step)
        )
    skipped = last.skipped_steps
    if skipped:
        sentences.append(f"{_count(skipped, 'step')} had no finite loss or gradient and changed nothing.")
    else:
        sentences.append("No step was skipped.")
    if resumed_after:
        steps = ", ".join(f"{step:,}" for step in resumed_after)
        times = "once" if len(resumed_after) == 1 else f"{len(resumed_after)} times"
        sentences.append(f"Resumed {times}, after step {steps}.")
    return sentences


def _lowest(losses: Sequence[tuple[int, float]], last_step: int) -> str:
    finite = [(loss, step) for step, loss in losses if math.isfinite(loss)]
    if not finite:
        return "."
    loss, step = min(finite)
    if step == last_step:
        return ", its lowest."
    return f"; its lowest was {loss:.4f} (perplexity {readable(perplexity_of(loss))}), after step {step:,}."


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}" + ("" if number == 1 else "s")


def _asset(name: str) -> str:
    return resources.files("llm_trainer.training").joinpath(name).read_text(encoding="utf-8")


def _controls() -> str:
    axes = "".join(
        f'<button type="button" data-axis="{axis}" aria-pressed="{"true" if axis == "steps" else "false"}">'
        f"{label}</button>"
        for axis, (label, _, _) in AXES.items()
    )
    log = '<button type="button" data-log aria-pressed="false">Logarithmic</button>'
    return f'<div class="controls" hidden>Over {axes} {log}</div>'


def _evaluations(history: TrainingHistory) -> str:
    records = [record for record in history if record.eval_loss is not None]
    if not records:
        return ""
    shown = records[-_MOST_EVALUATIONS:]
    note = f", the last {len(shown)}" if len(shown) < len(records) else ""
    head = "".join(f"<th>{name}</th>" for name in ("Step", "Tokens", "Time", "Held-out loss", "Perplexity"))
    rows = "".join(f"<tr>{_evaluation_cells(record)}</tr>" for record in reversed(shown))
    return (
        f"<details><summary>{_count(len(records), 'evaluation')}{note}</summary><div class='scroll'>"
        f"<table class='numbers'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>"
    )


def _evaluation_cells(record: HistoryRecord) -> str:
    loss = cast("float", record.eval_loss)
    cells = (
        f"{record.step:,}",
        compact(record.tokens),
        format_duration(record.wall_s),
        f"{loss:.4f}",
        readable(perplexity_of(loss)),
    )
    return "".join(f"<td>{cell}</td>" for cell in cells)


def _settings(settings: Mapping[str, Any]) -> str:
    """Return a table of the plain values, then one of each group of values."""
    plain = {name: value for name, value in settings.items() if not isinstance(value, Mapping)}
    groups = {name: cast("Mapping[str, Any]", value) for name, value in settings.items() if name not in plain}
    if plain:
        groups = {"settings": plain, **groups}
    tables = "".join(
        f"<details open><summary>{escape(name.capitalize())}</summary>"
        f"<table><tbody>{_setting_rows(group)}</tbody></table></details>"
        for name, group in groups.items()
    )
    return f'<section class="settings">{tables}</section>' if tables else ""


def _setting_rows(group: Mapping[str, Any]) -> str:
    def shown(value: object) -> str:
        return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)

    return "".join(
        f"<tr><th scope='row'>{escape(str(name))}</th><td>{escape(shown(value))}</td></tr>"
        for name, value in group.items()
    )
