"""Candidates, tried one by one, and the choice among them."""

from hamerspace.search.selection import choose, verdicts
from hamerspace.search.trials import Baseline, Trial, Trials

__all__ = ["Baseline", "Trial", "Trials", "choose", "verdicts"]
