"""Reading archives of torch.export without executing what may be hidden in them.

``torch.export.load`` trusts its file: an archive can ask for tensors to be unpickled, name any function of
Python's that torch can reach, and hold expressions that are evaluated as Python. So the archive is looked
through first, by the reader that torch uses itself, and what a saved model has no need of is refused.
"""

from __future__ import annotations

import ast
import json
import os
import re
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Final

from hamerspace._imports import need
from hamerspace.exceptions import ModelError, UnsafeModelError, first_line

_TARGET: Final = re.compile(
    # What reaches files, other processes or the debugger is no part of a model.
    r"torch\.ops\.(?!(prim|debugprims|profiler|rpc|_?c10d\w*)\.|aten\.(from_file|save|load)\b)"
    r"[A-Za-z_]\w*\.[A-Za-z_]\w*(\.\w+)?"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_|getitem|pos|not_)"
    r"|torch\.(sym_int|sym_float|sym_max|sym_min|sym_not|sym_ite|sym_sum|_sym_sqrt)"
    r"|math\.(ceil|floor|trunc)"
)
_NAME: Final = re.compile(r"[\w.$]*", re.ASCII)
_WORD: Final = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_EXPRESSION: Final = re.compile(r"[\w\s.,()+\-*/%<>=!&|~']*", re.ASCII)
_SYMBOL: Final = re.compile(r"[a-z]{1,3}\d+", re.ASCII)
# fmt: off
_FUNCTIONS: Final = frozenset(
    (
        "Abs", "Add", "And", "BooleanFalse", "BooleanTrue", "CeilDiv", "CeilToInt", "CleanDiv", "Eq",
        "Equality", "Float", "FloatPow", "FloatTrueDiv", "FloorDiv", "FloorToInt", "Ge", "GreaterThan",
        "Gt", "Half", "Identity", "Infinity", "IntTrueDiv", "Integer", "LShift", "Le", "LessThan", "Lt",
        "Max", "Min", "Mod", "ModularIndexing", "Mul", "Ne", "NegativeInfinity", "NegativeOne", "Not",
        "One", "Or", "Pow", "PowByNatural", "PythonMod", "RShift", "Rational", "RoundToInt",
        "StrictGreaterThan", "StrictLessThan", "Symbol", "ToFloat", "TruncToFloat", "TruncToInt",
        "Unequality", "Where", "Zero", "ceiling", "false", "finite", "floor", "int_oo", "integer",
        "negative", "nonnegative", "nonzero", "oo", "positive", "precision", "real", "sqrt", "true",
        "False", "True",
    )
)
# fmt: on
_ONE_AT_A_TIME: Final = Lock()
"""torch reads archives by a setting and with an object that the whole process shares."""
_POWERS: Final = frozenset(("Pow", "PowByNatural", "FloatPow", "LShift"))
_WORKS: Final = _POWERS | {"Add", "Mul"}
_MOST_POWERS: Final = 3
_MOST: Final = 64
"""The largest exponent."""


def load_exported(path: Path) -> Any:
    """Read an exported program.

    Raises:
        UnsafeModelError: the archive would execute something when it is read or run.
        ModelError: it cannot be read, or needs operators that are not there.
    """
    try:
        _look_through(path)
        with _ONE_AT_A_TIME, _tensors_only(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Not torch.export.load, which falls back to an older format that was not looked through.
            (program,) = (
                need("torch.export.pt2_archive._package").load_pt2(str(path)).exported_programs.values()
            )
    except UnsafeModelError:
        raise
    except Exception as error:
        raise ModelError(f"{path} cannot be read as a torch.export archive: {first_line(error)}") from error
    for node in program.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, str):
            raise ModelError(
                f"{path} needs the operator {node.target}, which is not there; import what brings it"
            )
    # Strings that `module()` would execute as Python; hamerspace checks shapes of its own.
    program._guards_code = []
    return program


def _look_through(path: Path) -> None:
    torch = need("torch")
    reader = torch._C.PyTorchFileReader(str(path))
    names: list[str] = list(reader.get_all_records())
    for name in names:
        if name.startswith(("data/weights/", "data/constants/")) and name.endswith("_config.json"):
            _check_payload(json.loads(reader.get_record(name)), f"{path}:{name}")
        elif name.startswith("models/"):
            _check_program(json.loads(reader.get_record(name)), f"{path}:{name}")
        elif name.startswith("data/aotinductor/"):
            raise ModelError("it holds compiled code of AOTInductor")


def _check_payload(data: Any, where: str) -> None:
    for name, entry in data.get("config", {}).items():
        if str(entry["path_name"]).startswith(("custom_obj_", "opaque_obj_")):
            raise UnsafeModelError(f"{where} holds {name} as a pickled object; save the model without it")


def _check_program(data: Any, where: str) -> None:
    for key, value in _strings(data):
        if key in ("target", "as_operator"):
            fits = _TARGET.fullmatch(value) is not None
        elif key == "expr_str":
            fits = (
                _EXPRESSION.fullmatch(value) is not None
                and all(word in _FUNCTIONS or _SYMBOL.fullmatch(word) for word in _WORD.findall(value))
                and _is_small(value)
            )
        else:
            fits = _NAME.fullmatch(value) is not None
        if not fits:
            raise UnsafeModelError(
                f"{where} has {value[:80]!r} as a {key}, which a saved model has no need of"
            )


def _is_small(expression: str) -> bool:
    """Whether an expression is soon worked out, as ``9**9**9`` is not: few powers of small exponents."""
    powers = 0
    for node in ast.walk(ast.parse(expression.strip(), mode="eval")):
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Pow, ast.LShift)):
            exponent: ast.expr = node.right
        elif isinstance(node, ast.Call) and _called(node) in _POWERS and len(node.args) == 2:
            exponent = node.args[1]
        else:
            continue
        powers += 1
        for part in ast.walk(exponent):
            works = isinstance(part, ast.BinOp) or (isinstance(part, ast.Call) and _called(part) in _WORKS)
            large = isinstance(part, ast.Constant) and isinstance(part.value, int) and part.value > _MOST
            if works or large:
                return False
    return powers <= _MOST_POWERS


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else ""


def _strings(data: Any) -> Iterator[tuple[str, str]]:
    """Every string that becomes code: targets, expressions, names of values and arguments."""
    if isinstance(data, list):
        for one in data:  # pyright: ignore[reportUnknownVariableType]
            yield from _strings(one)
    elif isinstance(data, dict):
        for key, value in data.items():  # pyright: ignore[reportUnknownVariableType]
            if key == "metadata":
                continue
            if key in ("target", "as_operator", "expr_str", "name") and isinstance(value, str):
                yield str(key), value  # pyright: ignore[reportUnknownArgumentType]
            elif key in ("range_constraints", "tensor_values", "sym_int_values", "sym_bool_values"):
                for name in value:  # pyright: ignore[reportUnknownVariableType]
                    yield "name", str(name)  # pyright: ignore[reportUnknownArgumentType]
                yield from _strings(value)
            else:
                yield from _strings(value)


@contextmanager
def _tensors_only() -> Generator[None, None, None]:
    """Have every ``torch.load`` refuse what is no tensor, those inside of torch as well."""
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before
