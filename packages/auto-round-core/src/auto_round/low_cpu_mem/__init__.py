"""Models whose weights stay on disk until they are needed, and files that are read without running them."""

from auto_round.low_cpu_mem._converter import ModelConverter, convert_model
from auto_round.low_cpu_mem._hooks import HookManager, register_hooks
from auto_round.low_cpu_mem._tensor_utils import TensorUtils
from auto_round.low_cpu_mem.pickle_wrapper import dump, dumps, load, loads

__all__ = [
    "HookManager",
    "ModelConverter",
    "TensorUtils",
    "convert_model",
    "dump",
    "dumps",
    "load",
    "loads",
    "register_hooks",
]
