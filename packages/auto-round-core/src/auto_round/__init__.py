"""Quantise large language models in little memory.

`AutoRound` quantises a model. The other public names live in the rooms: `auto_round.config_manager`,
`.low_cpu_mem`, `.memory_utils`, `.quantization` and `.exceptions`. Importing this package loads none of them,
and therefore no torch.

Intel publishes another package under this import name. Each of the two overwrites files of the other, so this
one refuses to load where Intel's is installed; where Intel's was installed last, Python finds only Intel's.
"""

from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from auto_round.quantization import AutoRound

__all__ = ["AutoRound", "__version__"]

__version__ = "0.1.0"

# Every distribution of Intel's that installs a package `auto_round`.
_SAME_IMPORT_NAME = ("auto-round", "auto-round-hpu", "auto-round-nightly")


def _refuse_beside_another() -> None:
    for name in _SAME_IMPORT_NAME:
        try:
            other = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        raise ImportError(
            f"auto-round-core and Intel's {name}, which is installed in {other.locate_file('')}, share the "
            "import name auto_round and overwrite each other's files, so an environment can hold only one of "
            f"them. Run `pip uninstall {name} auto-round-core`, then install the one that you want again.",
            name=__name__,
        )


_refuse_beside_another()


def __getattr__(name: str) -> Any:
    if name == "AutoRound":
        from auto_round.quantization import AutoRound

        return AutoRound
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
