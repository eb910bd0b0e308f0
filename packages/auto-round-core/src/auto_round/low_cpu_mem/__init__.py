"""Models whose weights stay on disk until they are needed, and files that are read without running them."""

from auto_round.low_cpu_mem.pickle_wrapper import dump, dumps, load, loads

__all__ = ["dump", "dumps", "load", "loads"]
