"""Reading a pickle without running anything that it names.

A pickle is a program. This machine runs the part of it that builds plain containers, and nowhere on its
stack is there a function or a class: a name that is allowed becomes an inert `Name`, and a call of it is
looked up in a table. So there is no object through which other code could be reached.
"""

from __future__ import annotations

import io
import pickletools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, cast

import torch

from auto_round._files import shown
from auto_round.exceptions import CheckpointError, UnsafeFileError

MOST_CONTAINERS = 5_000_000
"""Containers that a pickle may make; a single byte of it is enough for one that takes 200."""

_MOST_KEY_PARTS = 100
# Where each value is copied but once, all copies together are no longer than the pickle; this leaves room.
_MOST_COPIES = 16
_SCALARS = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device)
_MARK: Any = object()


@dataclass(frozen=True)
class Name:
    """A global that a pickle may mention."""

    full: str


Call = Callable[..., Any]


class Machine:
    """Reads one pickle.

    Args:
        path: What errors name.
        calls: What may be called besides the builders of plain containers, by full name. A function gets
            the arguments that stand in the pickle; what it returns is the result.
        names: What may be mentioned and stands for a value, by full name.
        persistent: Called with each persistent id; without it there may be none.
        encoding: How text of Python 2 is decoded; `bytes` leaves it as it is.
    """

    def __init__(
        self,
        path: Path,
        *,
        calls: Mapping[str, Call] | None = None,
        names: Mapping[str, Any] | None = None,
        persistent: Callable[[Any], Any] | None = None,
        encoding: str = "utf-8",
    ) -> None:
        self._path = path
        self._calls = {**_CALLS, **(calls or {})}
        self._names = {**_DTYPES, **(names or {})}
        self._persistent = persistent
        self._encoding = encoding
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._containers = 0
        self._copied = 0
        self._most_copied = 0

    def run(self, data: bytes) -> Any:
        """Return what the pickle describes; `data` must end where it does.

        Raises:
            UnsafeFileError: It names something that is not allowed, which the message shows, or makes more
                than `MOST_CONTAINERS` containers, copies upon copies of them, or a key that would take too
                long to hash.
            CheckpointError: It is damaged.
        """
        stream = io.BytesIO(data)
        value = self.run_next(stream)
        if stream.tell() != len(data):
            raise CheckpointError(f"{self._path} holds more than one pickled object.")
        return value

    def run_next(self, stream: io.BytesIO) -> Any:
        """Return what the pickle at the stream's position describes, and leave the stream behind it.

        Raises:
            UnsafeFileError: As for `run`.
            CheckpointError: As for `run`.
        """
        self._most_copied = _MOST_COPIES * len(stream.getbuffer())
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name == "STOP":
                    return self._pop()
                self._step(opcode.name, argument)
        except CheckpointError:
            raise
        except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"{self._path} holds a damaged pickle: {shown(str(error))}.") from error
        raise CheckpointError(f"{self._path} holds a pickle without an end.")

    def _step(self, opcode: str, argument: Any) -> None:
        if opcode in _LITERALS:
            self._stack.append(argument)
        elif opcode in _PUTS:
            self._memo[argument] = self._top()
        elif opcode in _GETS:
            self._stack.append(self._memo[argument])
        elif opcode in _TEXTS:
            raw = argument.encode("latin-1")
            self._stack.append(raw if self._encoding == "bytes" else raw.decode(self._encoding))
        else:
            self._work(opcode, argument)

    def _work(self, opcode: str, argument: Any) -> None:
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "NONE":
                self._stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                self._stack.append(opcode == "NEWTRUE")
            case "MARK":
                self._stack.append(_MARK)
            case "POP":
                self._stack.pop()
            case "POP_MARK":
                self._to_mark()
            case "DUP":
                self._stack.append(self._top())
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._top()
            case "EMPTY_TUPLE":
                self._stack.append(())
            case "EMPTY_LIST":
                self._new([])
            case "EMPTY_DICT":
                self._new({})
            case "EMPTY_SET":
                self._new(set())
            case "BYTEARRAY8":
                self._new(bytearray(argument))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self._new(self._last(int(opcode[-1])))
            case "TUPLE":
                self._new(tuple(self._to_mark()))
            case "LIST":
                self._new(self._to_mark())
            case "FROZENSET":
                self._new(frozenset(map(self._key, self._to_mark())))
            case "DICT":
                pairs = self._to_mark()
                self._new({})
                self._set_items(pairs)
            case "APPEND":
                self._append([self._pop()])
            case "APPENDS":
                self._append(self._to_mark())
            case "ADDITEMS":
                self._add(self._to_mark())
            case "SETITEM":
                self._set_items(list(self._last(2)))
            case "SETITEMS":
                self._set_items(self._to_mark())
            case "GLOBAL" | "INST":
                module, _, name = argument.partition(" ")
                if opcode == "INST":
                    self._refuse(f"an instance of {shown(f'{module}.{name}')}")
                self._global(module, name)
            case "STACK_GLOBAL":
                self._global(*self._last(2))
            case "REDUCE" | "NEWOBJ":
                arguments = self._pop()
                self._call(self._pop(), arguments)
            case "BUILD":
                # The state of an OrderedDict (a module's `_metadata`) or of a tensor is left out.
                self._pop()
            case "PERSID" | "BINPERSID":
                self._persistent_id(argument if opcode == "PERSID" else self._pop())
            case _:
                self._refuse(f"the pickle instruction {opcode}, which no plain container needs")

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("a mark stands where a value should be")
        return value

    def _top(self) -> Any:
        if self._stack[-1] is _MARK:
            raise ValueError("a mark stands where a value should be")
        return self._stack[-1]

    def _to_mark(self) -> list[Any]:
        for position in range(len(self._stack) - 1, -1, -1):
            if self._stack[position] is _MARK:
                values = self._stack[position + 1 :]
                del self._stack[position:]
                return values
        raise ValueError("there is no mark")

    def _new(self, value: Any) -> None:
        self._containers += 1
        if self._containers > MOST_CONTAINERS:
            self._refuse(f"more than {MOST_CONTAINERS} containers")
        self._stack.append(value)

    def _refuse(self, what: str) -> NoReturn:
        raise UnsafeFileError(
            f"{self._path} asks for {what}. Only tensors and plain containers are read from a pickle, and "
            f"nothing of it was run. If you trust whoever wrote the file as you would a program of theirs, "
            f"load(..., allow_unsafe=True) runs it."
        )

    def _key(self, value: Any) -> Any:
        reason = _why_no_key(value)
        if reason is not None:
            self._refuse(reason)
        return value

    def _global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("the name of a global is no text")
        full = f"{_FROM_PYTHON_2.get(module, module)}.{name}"
        if full in self._names:
            self._stack.append(self._names[full])
        elif full in self._calls:
            self._stack.append(Name(full))
        else:
            self._refuse(f"the global {shown(full)}")

    def _call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            self._refuse(f"a call of {shown(function)}")
        values = cast("tuple[Any, ...]", arguments)
        # A few bytes can ask for another copy of all that came before.
        self._copied += sum(len(value) for value in values if isinstance(value, Sized))
        if self._copied > self._most_copied:
            self._refuse("copies upon copies of its content")
        self._new(self._calls[function.full](*values))

    def _set_items(self, pairs: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(pairs) % 2:
            raise ValueError("items are set on what is no dictionary")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            cast("dict[Any, Any]", target)[self._key(key)] = value

    def _append(self, values: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, list):
            raise TypeError("values are appended to what is no list")
        cast("list[Any]", target).extend(values)

    def _add(self, values: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, set):
            raise TypeError("values are added to what is no set")
        cast("set[Any]", target).update(map(self._key, values))

    def _persistent_id(self, value: Any) -> None:
        if self._persistent is None:
            self._refuse(f"the persistent object {shown(value)}")
        self._stack.append(self._persistent(value))

    def _last(self, count: int) -> tuple[Any, ...]:
        return tuple(reversed([self._pop() for _ in range(count)]))


def _ordered(pairs: Any = ()) -> OrderedDict[Any, Any]:
    if not isinstance(pairs, dict | list | tuple):
        raise TypeError("an OrderedDict is made of what is neither a dictionary nor a list")
    items = cast("Iterable[Any]", pairs.items() if isinstance(pairs, dict) else pairs)
    return OrderedDict((_plain_key(key), value) for key, value in items)


def _counter(counts: Any = None) -> Counter[Any]:
    if counts is not None and not isinstance(counts, dict):
        raise TypeError("a Counter is made of what is no dictionary")
    return Counter(cast("dict[Any, int]", counts or {}))


def _why_no_key(value: Any) -> str | None:
    # The hash of a tuple is computed anew each time, so tuples of shared tuples could take for ever.
    parts = [value]
    seen = 0
    while parts:
        part = parts.pop()
        seen += 1
        if seen > _MOST_KEY_PARTS:
            return f"a key or a set's member of more than {_MOST_KEY_PARTS} parts"
        if isinstance(part, tuple | frozenset):
            parts.extend(islice(cast("Iterable[Any]", part), _MOST_KEY_PARTS))
        elif not isinstance(part, _SCALARS):
            return f"a key or a set's member of type {type(part).__name__}"
    return None


def _plain_key(key: Any) -> Any:
    reason = _why_no_key(key)
    if reason is not None:
        raise TypeError(reason)
    return key


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise TypeError("bytes are made of what is no text in Latin 1")
    return text.encode("latin-1")


def _bytearray(text: Any = b"", encoding: Any = None) -> bytearray:
    if isinstance(text, str):
        return bytearray(_encode(text, encoding))
    if not isinstance(text, bytes):
        raise TypeError("a bytearray is made of what are no bytes")
    return bytearray(text)


def _members(values: Any = None) -> list[Any]:
    if values is not None and not isinstance(values, list):
        raise TypeError("a set is made of what is no list")
    return [_plain_key(value) for value in cast("list[Any]", values or [])]


def _complex(real: Any, imaginary: Any) -> complex:
    if not (isinstance(real, float) and isinstance(imaginary, float)):
        raise TypeError("a complex number is made of what are no numbers")
    return complex(real, imaginary)


def _size(values: Any = ()) -> torch.Size:
    if not isinstance(values, tuple) or not all(type(v) is int for v in cast("tuple[Any, ...]", values)):
        raise TypeError("a torch.Size is made of what are no integers")
    return torch.Size(cast("tuple[int, ...]", values))


def _device(kind: Any, index: Any = None) -> torch.device:
    if not isinstance(kind, str) or not (index is None or type(index) is int):
        raise TypeError("a torch.device is made of what is no name")
    try:
        return torch.device(kind) if index is None else torch.device(kind, index)
    except RuntimeError as error:
        raise ValueError(f"{shown(kind)} is no device") from error


_FROM_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_CALLS: dict[str, Call] = {
    "collections.OrderedDict": _ordered,
    "collections.Counter": _counter,
    "_codecs.encode": _encode,
    "builtins.bytearray": _bytearray,
    # Without arguments, as the oldest protocols write empty bytes.
    "builtins.bytes": lambda: b"",
    "builtins.set": lambda *values: set(_members(*values)),
    "builtins.frozenset": lambda *values: frozenset(_members(*values)),
    "builtins.complex": _complex,
    "torch.Size": _size,
    "torch.device": _device,
}
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_LITERALS = frozenset(
    (
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
    )
)
_TEXTS = frozenset(["STRING", "BINSTRING", "SHORT_BINSTRING"])
_PUTS = frozenset(["PUT", "BINPUT", "LONG_BINPUT"])
_GETS = frozenset(["GET", "BINGET", "LONG_BINGET"])
