"""What runs a model: one module a runtime, each loaded when first used."""

from hamerspace.runtimes.base import Runner, RunOptions
from hamerspace.runtimes.callable import LoadedModel
from hamerspace.runtimes.opening import open_runtime

__all__ = ["LoadedModel", "RunOptions", "Runner", "open_runtime"]
