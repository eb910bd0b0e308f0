"""A recording as an HTML page for people, and as trace events for Perfetto and Chrome."""

from av_memory.report._page import report_html, save_report
from av_memory.report._trace import save_trace, trace_events

__all__ = ["report_html", "save_report", "save_trace", "trace_events"]
