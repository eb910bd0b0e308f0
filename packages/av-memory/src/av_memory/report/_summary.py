"""What a recording says in short: statistics by scope name, and where its peak lies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from av_memory.recording import Recording, ScopeRecord, Series
from av_memory.report._format import format_mb, format_s

LIMIT_NAMES = {
    "limit_mb": "the limit that was set",
    "cgroup_limit_mb": "the control group's limit",
    "machine_total_mb": "the machine's memory",
}
"""From the nearest to the farthest."""


@dataclass(slots=True)
class ScopeSummary:
    """Every kept passage through the scopes of one name."""

    name: str
    count: int = 0
    wall_s: float = 0.0
    peak_mb: float = float("-inf")
    peak_sum_mb: float = 0.0
    net_sum_mb: float = 0.0
    exact: int = 0
    """Passages whose peak is the kernel's own."""
    gpu_peaks_mb: dict[int, float] = field(default_factory=dict[int, float])
    tree_peak_mb: float | None = None
    tree_pss_peak_mb: float | None = None
    errors: Counter[str] = field(default_factory=Counter[str])

    def add(self, scope: ScopeRecord) -> None:
        """Count one passage."""
        self.count += 1
        self.wall_s += scope.wall_s
        self.peak_mb = max(self.peak_mb, scope.cpu.peak_mb)
        self.peak_sum_mb += scope.cpu.peak_mb
        self.net_sum_mb += scope.cpu.net_mb
        self.exact += scope.cpu.peak_exact
        for index, usage in scope.gpus.items():
            self.gpu_peaks_mb[index] = max(self.gpu_peaks_mb.get(index, 0.0), usage.peak_mb)
        if scope.tree is not None:
            self.tree_peak_mb = max(self.tree_peak_mb or 0.0, scope.tree.peak_mb)
        if scope.tree_pss_peak_mb is not None:
            self.tree_pss_peak_mb = max(self.tree_pss_peak_mb or 0.0, scope.tree_pss_peak_mb)
        if scope.error is not None:
            self.errors[scope.error] += 1

    @property
    def exactness(self) -> str:
        """Whether the peaks are exact or sampled."""
        if self.exact in (0, self.count):
            return "exact" if self.exact else "sampled"
        return f"{self.exact} of {self.count} exact"


def summarise_scopes(scopes: Iterable[ScopeRecord]) -> list[ScopeSummary]:
    """One summary a name, the largest peak first."""
    summaries: dict[str, ScopeSummary] = {}
    for scope in scopes:
        summaries.setdefault(scope.name, ScopeSummary(scope.name)).add(scope)
    return sorted(summaries.values(), key=lambda summary: (-summary.peak_mb, -summary.wall_s, summary.name))


def peak_of(series: Series) -> tuple[float, float]:
    """Time and value of the largest sample."""
    index = max(range(len(series.values_mb)), key=series.values_mb.__getitem__)
    return series.times_s[index], series.values_mb[index]


def scopes_at(scopes: Iterable[ScopeRecord], time_s: float) -> str:
    """The scopes that were open at a time, outermost first; empty if none was."""
    stacks: dict[str, list[ScopeRecord]] = {}
    for scope in scopes:
        if scope.start_s <= time_s <= scope.start_s + scope.wall_s:
            stacks.setdefault(scope.thread, []).append(scope)
    paths = {
        thread: " › ".join(scope.name for scope in sorted(stack, key=lambda s: (s.depth, s.start_s)))
        for thread, stack in stacks.items()
    }
    if len(paths) < 2:
        return next(iter(paths.values()), "")
    named = [f"{path} ({thread})" for thread, path in paths.items()]
    more = f" and {len(named) - 3} more threads" if len(named) > 3 else ""
    return ", ".join(named[:3]) + more


def verdict(recording: Recording) -> list[str]:
    """Sentences that say what the peak was, when, in which scope, and how near to a limit."""
    curves = {series.name: series for series in recording.series if series.values_mb}
    watched = bool(recording.command)
    order = ("tree rss", "cpu") if watched else ("cpu", "tree rss")
    main = next((name for name in order if name in curves), None)
    sentences: list[str] = []
    if watched and recording.exit_code is not None:
        sentences.append(f"The command ended with exit code {recording.exit_code}.")
    if main is None:
        largest = max((process.peak_rss_mb for process in recording.processes), default=0.0)
        sentences.append(f"The peak was {format_mb(largest)}." if largest else "No memory was sampled.")
        return sentences
    time_s, peak_mb = peak_of(curves[main])
    place = f"at {format_s(time_s)}" + _inside(scopes_at(recording.scopes, time_s))
    exact = [scope for scope in recording.scopes if scope.cpu.peak_mb > peak_mb] if main == "cpu" else []
    if exact:
        # Between two samples: the shortest scope that saw it says most about where it was.
        scope = max(exact, key=lambda scope: (scope.cpu.peak_mb, scope.depth, -scope.wall_s))
        peak_mb = scope.cpu.peak_mb
        end_s = scope.start_s + scope.wall_s
        place = f"between {format_s(max(scope.start_s, 0))} and {format_s(end_s)}, in {scope.name}"
    elif watched:
        largest = max(recording.processes, key=lambda process: process.peak_rss_mb, default=None)
        if largest is not None and largest.peak_rss_mb > peak_mb:
            peak_mb, place = largest.peak_rss_mb, "between two samples"
    of = "all processes together" if main == "tree rss" else "the process"
    sentences.append(f"The peak of {of} was {format_mb(peak_mb)} {place}.")
    sentences.extend(_against(recording.limits, peak_mb))
    if len(recording.processes) > 1:
        largest = max(recording.processes, key=lambda process: process.peak_rss_mb)
        size = format_mb(largest.peak_rss_mb)
        sentences.append(
            f"The largest of {len(recording.processes)} was {largest.name} ({largest.pid}), {size}."
        )
    for name in ("tree rss", "tree pss", *sorted(name for name in curves if name.startswith("cuda:"))):
        if name in curves and name != main:
            time_s, value_mb = peak_of(curves[name])
            inside = "" if watched else _inside(scopes_at(recording.scopes, time_s))
            sentences.append(
                f"{series_label(name)}: at most {format_mb(value_mb)}, at {format_s(time_s)}{inside}."
            )
    return sentences


def series_label(name: str) -> str:
    """What a curve is called on the page."""
    if name.startswith("cuda:"):
        return f"GPU {name.removeprefix('cuda:')} (torch, allocated)"
    return {
        "cpu": "Process (RSS)",
        "tree rss": "Process tree (sum of RSS)",
        "tree pss": "Process tree (PSS)",
    }.get(name, name)


def _inside(path: str) -> str:
    return f", in {path}" if path else ""


def _against(limits: dict[str, float], peak_mb: float) -> list[str]:
    for key, name in LIMIT_NAMES.items():
        if limits.get(key, 0) > 0:
            return [f"That is {peak_mb / limits[key]:.0%} of {name} ({format_mb(limits[key])})."]
    return []
