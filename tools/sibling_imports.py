"""Finds where one package reaches past the public names of another."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["find_trespasses", "read_all"]


@dataclass(frozen=True, kw_only=True)
class _Module:
    exported: frozenset[str] | None
    """The names in `__all__`, or None where the module has none that can be read without running it."""
    submodules: frozenset[str]


@dataclass
class _Packages:
    """The modules of the packages under `sources`, read when first asked for."""

    sources: dict[str, Path]
    modules: dict[str, _Module | None] = field(default_factory=dict[str, _Module | None])

    def module(self, name: str) -> _Module | None:
        if name not in self.modules:
            self.modules[name] = self._read(name)
        return self.modules[name]

    def _read(self, name: str) -> _Module | None:
        top, *rest = name.split(".")
        place = self.sources[top].joinpath(*rest)
        if place.is_dir():
            init = place / "__init__.py"
            inside = {p.stem for p in place.glob("*.py")} | {p.name for p in place.iterdir() if p.is_dir()}
            return _Module(exported=read_all(init) if init.exists() else None, submodules=frozenset(inside))
        file = place.with_suffix(".py")
        return _Module(exported=read_all(file), submodules=frozenset()) if file.exists() else None


def read_all(file: Path) -> frozenset[str] | None:
    """The names in a module's literal `__all__`; None where it has none that can be read unrun."""
    for node in ast.parse(file.read_text(encoding="utf-8"), str(file)).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="__all__")]) | ast.AnnAssign(target=ast.Name(id="__all__")):
                if isinstance(node.value, ast.List | ast.Tuple):
                    constants = [element for element in node.value.elts if isinstance(element, ast.Constant)]
                    return frozenset(c.value for c in constants if isinstance(c.value, str))
            case _:
                pass
    return None


def find_trespasses(file: Path, sources: dict[str, Path]) -> Iterator[str]:
    """Problems in `file`, each with its line, for imports from and attributes of the packages in `sources`.

    `sources` maps the import name of each sibling to its folder. A name may be used if no part of its path
    begins with an underscore and it is a module, or stands in the `__all__` of the module it is taken from.
    """
    yield from dict.fromkeys(_find(file, _Packages(sources)))


def _find(file: Path, packages: _Packages) -> Iterator[str]:
    sources = packages.sources
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    bound: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                if top in sources:
                    yield from _at(file, node, _judge(packages, top, alias.name.split(".")[1:]))
                    bound[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            top, *rest = node.module.split(".")
            if top in sources:
                for alias in node.names:
                    parts = [*rest, alias.name]
                    yield from _at(file, node, _judge(packages, top, parts))
                    if packages.module(".".join([top, *parts])):
                        bound[alias.asname or alias.name] = ".".join([top, *parts])
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            chain = _chain(node)
            if chain and chain[0] in bound:
                top, *rest = bound[chain[0]].split(".")
                yield from _at(file, node, _judge(packages, top, [*rest, *chain[1:]], attribute=len(rest)))


def _chain(node: ast.expr) -> list[str]:
    """`["a", "b", "c"]` for the expression `a.b.c`, and nothing for any other."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        head = _chain(node.value)
        return [*head, node.attr] if head else []
    return []


def _judge(packages: _Packages, top: str, parts: list[str], attribute: int = 0) -> str | None:
    """What is wrong with reaching `parts` from the package `top`; the first `attribute` of them are known."""
    here = top
    for index, part in enumerate(parts):
        if part.startswith("_") and not part.endswith("__"):
            return f"{here}.{part} is private to {top}"
        module = packages.module(here)
        if module is None or part.startswith("__"):
            return None
        if index >= attribute and part not in module.submodules and part not in (module.exported or ()):
            if part == "*":
                return f"{here} is imported with a star"
            return f"{here}.{part} is not in the __all__ of {here}"
        here = f"{here}.{part}"
    return None


def _at(file: Path, node: ast.stmt | ast.expr, problem: str | None) -> Iterator[str]:
    if problem:
        yield f"{file}:{node.lineno}: {problem}"
