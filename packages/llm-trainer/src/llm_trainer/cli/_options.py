"""What the commands' options have in common."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import click
import typer
from typer.core import TyperCommand

# As Any, because click's generics leave the types of the two partly unknown.
option: Any = cast("Any", typer).Option
argument: Any = cast("Any", typer).Argument
_LEVELS = ("debug", "info", "warning", "error", "critical")


def spelled_either_way(token: str) -> str:
    """Return an option's name with hyphens, however it was spelled."""
    return token.replace("_", "-")


class Command(TyperCommand):
    """A command whose options that may be given several times also take several values: `--prompts a b`.

    The values go on to the next argument that begins with a hyphen; a value that does itself is given as
    `--prompts=-x`. The examples in its help keep their lines.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A backspace is click's mark of a paragraph that is not to be filled.
        self.help = re.sub(r"^Examples?:$", "\b\n\\g<0>", self.help or "", flags=re.MULTILINE)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the option before each of its values, which is what click understands."""
        many = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        return super().parse_args(ctx, repeat_option(args, many))


def repeat_option(args: Sequence[str], names: Collection[str]) -> list[str]:
    """Return `--prompts a --prompts b` for `--prompts a b`, and so for all `names`."""
    spread: list[str] = []
    option, has_value = None, False
    for index, arg in enumerate(args):
        if arg == "--":
            return [*spread, *args[index:]]
        if arg.startswith("-") and arg != "-":
            option, has_value = (arg if spelled_either_way(arg) in names else None), False
        elif option is not None and has_value:
            spread.append(option)
        else:
            has_value = True
        spread.append(arg)
    return spread


def _set_level(level: str) -> str:
    # Before anything heavy is imported, for `main` asks the logger whether to show a traceback.
    if level.lower() not in _LEVELS:
        raise typer.BadParameter(f"{level!r} is none of {', '.join(_LEVELS)}")
    logging.getLogger("llm_trainer").setLevel(level.upper())
    return level.lower()


LogLevel = Annotated[
    str,
    option(
        metavar="LEVEL",
        callback=_set_level,
        help=f"What to log on standard error: {', '.join(_LEVELS)}. debug also shows tracebacks.",
    ),
]
ModelPath = Annotated[
    Path,
    option(
        metavar="DIR",
        help="Folder of a trained model: the output folder of `train`, or a checkpoint.",
    ),
]
Device = Annotated[
    str | None,
    option(metavar="NAME", help="cpu, cuda, cuda:1, mps ...; by default the fastest one there is."),
]
ConfigFile = Annotated[
    Path | None,
    option(
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help="YAML or JSON file with the sections model, training and data.",
    ),
]
Json = Annotated[bool, option("--json", help="Print JSON instead of a table.")]
