"""A quantisation as one HTML page for people."""

from auto_round.report._page import report_html, save_html

__all__ = ["report_html", "save_html"]
