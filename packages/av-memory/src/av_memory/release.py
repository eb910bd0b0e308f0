"""Giving memory back: what a caller hands over is let go, and said with reasons where it cannot be.

A function cannot delete its caller's variable. It can empty a list or dictionary in place, and it can
make a tensor let go of its storage. The second is done only where nobody can miss it: where the tensor
is its storage's only owner, and one variable of the caller, besides the containers that were handed
over, is all that refers to the tensor. Every other tensor is left as it is.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import sys
import weakref
from collections import Counter, UserDict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import CellType, FrameType
from typing import TYPE_CHECKING, Any, cast

from av_memory._recorder import RECORDER
from av_memory._units import to_mb
from av_memory.allocator import AllocatorTuning, trim_heap, tune_allocator
from av_memory.probes import initialised_cuda

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

__all__ = ["Kept", "Optimization", "Release", "clear_memory", "optimize_memory_usage"]


@dataclass(frozen=True, slots=True)
class Kept:
    """Memory that was handed over and is still in use."""

    size_bytes: int
    what: str
    """Kind, shape and dtype."""
    reason: str


@dataclass(frozen=True, slots=True)
class Release:
    """What :func:`clear_memory` did. Sizes in bytes, or in MB of 2**20 bytes where the name says so."""

    freed_bytes: int = 0
    """Storages handed over that no longer exist: checked, not assumed."""
    left_bytes: int = 0
    """Storages handed over that still exist."""
    left: tuple[Kept, ...] = ()
    """Each of those, with the reason."""
    rss_before_mb: float = 0.0
    rss_after_mb: float = 0.0
    collected_objects: int | None = None
    """Unreachable objects that the collector found; ``None`` if it was not run."""
    cuda_cache_freed_bytes: int = 0
    """Given back to the GPUs by emptying torch's cache."""
    workers_stopped: int = 0
    """Worker processes of the dataloader that were ended."""

    def __str__(self) -> str:
        lines = [
            f"freed {to_mb(self.freed_bytes):.1f} MB, left {to_mb(self.left_bytes):.1f} MB; resident set "
            f"{self.rss_before_mb:.1f} -> {self.rss_after_mb:.1f} MB"
        ]
        lines += [
            f"  left {kept.what} ({to_mb(kept.size_bytes):.1f} MB): {kept.reason}" for kept in self.left
        ]
        return "\n".join(lines)


def clear_memory(
    weights: Any = None,
    dataloader: DataLoader[Any] | None = None,
    force_cuda_empty_cache: bool = False,
    *,
    collect: bool = True,
    stacklevel: int = 1,
) -> Release:
    """Let go of what is handed over, collect garbage, and give free memory back to the system.

    Python gives a function no way to delete its caller's variable, so this does the nearest thing:

    - A list, dictionary, set or deque that is handed over is emptied in place. One inside it is emptied
      too unless somebody else holds it.
    - A tensor's storage is freed in place if the tensor is its only owner and nothing refers to the
      tensor but one variable of the caller and the containers handed over. **Using such a tensor
      afterwards raises** ``RuntimeError`` (only constructors such as ``torch.tensor(x)`` are beyond reach:
      they see an empty tensor). The graph of a result that has a ``grad_fn`` goes with it.
    - Any other tensor is left untouched and only loses the container's reference: views and tensors that
      have views, tensors that share memory with numpy or through DLPack, tensors saved for a backward
      pass, elements of a dataset, parameters of a live module, tensors with a second name. Delete those
      names instead.
    - A module that is handed over, and that nothing else refers to, gives up its parameters and buffers
      by the same rules.

    torch is used only if the program has imported it. CUDA is never started.

    Args:
        weights: a tensor, a module, or a container of such, nested as you like. Anything else is left,
            and the result says so.
        dataloader: a ``DataLoader`` whose persistent worker processes are ended; those of an iterator
            that you hold yourself, or of a loop under way, end with it. The dataset is left alone.
        force_cuda_empty_cache: empty torch's CUDA cache even if nothing on a GPU was handed over.
        collect: run ``gc.collect()``, which takes about 0.2 s once torch is loaded. Without it, memory in
            reference cycles stays until Python collects it by itself.
        stacklevel: 1 counts the caller's variables; a function that passes on its own argument gives 2,
            so that its parameter and its caller's variable both count as the one name.

    Returns:
        What was freed, what was left and why. A storage counts as freed once it no longer exists.

    Raises:
        TypeError: ``dataloader`` is not a ``DataLoader``.
        ValueError: ``stacklevel`` is below 1.
    """
    if stacklevel < 1:
        raise ValueError(f"stacklevel is {stacklevel}; it starts at 1, the caller")
    rss_before = RECORDER.read_rss()
    workers = 0 if dataloader is None else _stop_workers(dataloader)
    handed_over = _HandedOver([] if weights is None else [weights])
    del weights, dataloader
    frames = list(_callers(inspect.currentframe(), stacklevel))
    handed_over.let_go(frames)
    del frames
    collected = gc.collect() if collect else None
    trim_heap()
    cache_freed = 0
    if force_cuda_empty_cache or handed_over.on_gpu or handed_over.nothing:
        cache_freed = _empty_cuda_cache()
    freed, left = handed_over.outcome()
    return Release(
        freed_bytes=freed,
        left_bytes=sum(kept.size_bytes for kept in left),
        left=tuple(left),
        rss_before_mb=to_mb(rss_before),
        rss_after_mb=to_mb(RECORDER.read_rss()),
        collected_objects=collected,
        cuda_cache_freed_bytes=cache_freed,
        workers_stopped=workers,
    )


@dataclass(frozen=True, slots=True)
class Optimization:
    """What :func:`optimize_memory_usage` did."""

    allocator: AllocatorTuning
    release: Release


def optimize_memory_usage(*, mmap_threshold_bytes: int = 1 << 20) -> Optimization:
    """Set the process up to hold little memory: tune the allocator, collect, trim, and empty GPU caches.

    Packages that have a configuration of their own call this with what it says.

    Args:
        mmap_threshold_bytes: see :func:`av_memory.tune_allocator`.
    """
    return Optimization(tune_allocator(mmap_threshold_bytes), clear_memory(force_cuda_empty_cache=True))


def _callers(frame: FrameType | None, count: int) -> Iterator[FrameType]:
    while count > 0 and frame is not None and (frame := frame.f_back) is not None:
        yield frame
        count -= 1


# What was handed over

_EMPTIED: tuple[type[Any], ...] = (list, dict, set, deque, UserDict)
"""Containers that can be emptied; tuples and frozen sets only hold on to what is in them."""


@dataclass(slots=True, eq=False)
class _Node:
    """One object within what was handed over, and who refers to it."""

    value: Any
    is_part: bool = False
    """Whether it is what a module or mapping is made of, which no variable has business with."""
    only: frozenset[int] | None = None
    """Of a dictionary of attributes, the ones to go on to, by identity."""
    empties: bool = False
    """Whether it is a container to empty, and not the inside of a module or mapping."""
    parts: set[int] = field(default_factory=set[int])
    """What a module or mapping is made of, by identity."""
    edges: Counter[int] = field(default_factory=Counter[int])
    """How often each container within what was handed over, by identity, refers to it."""
    names: Counter[int] = field(default_factory=Counter[int])
    """How many variables of each of the caller's frames, by number, are bound to it."""
    others: int = 0
    """References from anywhere else than ``edges``."""


def _references(node: _Node) -> int:
    return sys.getrefcount(node.value)


# What getrefcount says of an object that only a node refers to.
_OWN_REFERENCES = _references(_Node(object()))


@dataclass(slots=True, eq=False)
class _Fate:
    """Something to look at again when everything is done."""

    size_bytes: int
    what: str
    is_gone: Callable[[], bool]
    counts_as_freed: bool
    reason: str = "something that was not found refers to it; collect=True may free it"


class _HandedOver:
    def __init__(self, roots: list[Any]) -> None:
        self.nothing = not roots
        self.on_gpu = False
        self._fates: dict[int, _Fate] = {}
        self._nodes: dict[int, _Node] = {}
        self._root: int | None = None
        self._beyond_reach: list[Kept] = []
        if not roots:
            return
        if _is_tensor(roots[0]) or _is_container(roots[0]):
            self._root = id(roots[0])
            self._gather(roots)
        elif type(roots[0]) is not _freed_tensor:
            size = getattr(roots[0], "nbytes", None)
            self._beyond_reach.append(
                Kept(
                    size if isinstance(size, int) else sys.getsizeof(roots[0]),
                    type(roots[0]).__name__,
                    "only tensors, modules and containers can be freed through a function; delete its name",
                )
            )

    def _gather(self, roots: list[Any]) -> None:
        root = _Node(roots.pop())
        root.empties = issubclass(type(root.value), _EMPTIED)
        self._nodes[id(root.value)] = root
        pending = [root]
        while pending:
            parent = pending.pop()
            for child, is_part, only in _children(parent):
                node = self._nodes.get(id(child))
                if node is None:
                    node = self._nodes[id(child)] = _Node(child, is_part, only)
                    node.empties = parent.empties and not is_part and issubclass(type(child), _EMPTIED)
                    pending.append(node)
                node.edges[id(parent.value)] += 1
                if is_part:
                    parent.parts.add(id(child))

    def let_go(self, frames: list[FrameType]) -> None:
        """Empty the containers that only the caller holds, and free the tensors that nobody can miss."""
        if self._root is None:
            return
        for number, frame in enumerate(frames):
            for key in _variables_bound(frame, self._nodes, frames[:number]):
                self._nodes[key].names[number] += 1
        for node in self._nodes.values():
            node.others = _references(node) - _OWN_REFERENCES - node.edges.total()
        owned = self._owned_containers()
        tensors = [node for node in self._nodes.values() if _is_tensor(node.value)]
        for node in tensors:
            reason = _why_not_plain(node.value)
            if reason is not None:
                self._watch_object(node.value, reason)
                continue
            fate = self._watch_storage(node.value)
            reason = _why_not(node, owned)
            if reason is None:
                _free_in_place(sys.modules["torch"], node.value)
            elif fate is not None:
                fate.reason = reason
        containers: list[Any] = [
            node.value for key, node in self._nodes.items() if key in owned and node.empties
        ]
        tensors.clear()
        self._nodes.clear()
        for container in containers:
            _empty(container)

    def _owned_containers(self) -> set[int]:
        """Containers that nobody but the caller's one name, and other such containers, refers to."""
        containers = {key: node for key, node in self._nodes.items() if not _is_tensor(node.value)}
        owned = set(containers)

        def is_lost(key: int) -> bool:
            node = containers[key]
            # A container that was handed over is emptied whoever else holds it.
            if key == self._root and node.empties:
                return False
            return not _only_named(node, owned) or not node.parts <= owned

        while lost := set(filter(is_lost, owned)):
            owned -= lost
        return owned

    def _watch_storage(self, tensor: Any) -> _Fate | None:
        fate = None
        gradient = tensor.grad if tensor.is_leaf or tensor.retains_grad else None
        for one in (tensor, gradient):
            if one is None or _why_not_plain(one) is not None:
                continue
            storage = one.untyped_storage()
            self.on_gpu = self.on_gpu or one.is_cuda
            watched = self._fates.get(storage._cdata)
            if watched is None and storage.nbytes() > 0:
                kind, dtype = type(one).__name__, str(one.dtype).removeprefix("torch.")
                what = f"{kind} {tuple(one.shape)} {dtype}" + ("" if one is tensor else " (gradient)")
                is_gone = _weak_reference(storage).expired
                watched = self._fates[storage._cdata] = _Fate(storage.nbytes(), what, is_gone, True)
            fate = fate or watched
        return fate

    def _watch_object(self, tensor: Any, reason: str) -> None:
        reference = weakref.ref(tensor)
        size = 0
        # Such a tensor may have no size, or refuse to tell.
        with contextlib.suppress(Exception):
            size = int(tensor.numel() * tensor.element_size())
        kind = type(tensor).__name__
        self._fates[id(reference)] = _Fate(size, kind, lambda: reference() is None, False, reason)

    def outcome(self) -> tuple[int, list[Kept]]:
        freed, left = 0, self._beyond_reach.copy()
        for fate in self._fates.values():
            if not fate.is_gone():
                left.append(Kept(fate.size_bytes, fate.what, fate.reason))
            elif fate.counts_as_freed:
                freed += fate.size_bytes
        return freed, left


# Kinds go by type(), as isinstance() believes what a proxy or mock says of its class.


def _is_tensor(value: Any) -> bool:
    tensor = getattr(sys.modules.get("torch"), "Tensor", None)
    return tensor is not None and issubclass(type(value), tensor) and type(value) is not _freed_tensor


def _is_module(value: Any) -> bool:
    module = getattr(getattr(sys.modules.get("torch"), "nn", None), "Module", None)
    return module is not None and issubclass(type(value), module)


def _is_container(value: Any) -> bool:
    return issubclass(type(value), (*_EMPTIED, tuple, frozenset)) or _is_module(value)


def _children(node: _Node) -> Iterator[tuple[Any, bool, frozenset[int] | None]]:
    """What a container refers to, each as often as it does; whether it is a part of the container itself;
    and, for a dictionary of attributes, the ones to go on to.

    ``gc.get_referents`` tells the references themselves, whatever a class makes of iteration.
    """
    value: Any = node.value
    if _is_tensor(value):
        return
    parts: frozenset[int] | None = node.only
    attributes: Any = None
    if parts is None:
        if _is_module(value):
            parts = frozenset(map(id, (value._parameters, value._buffers, value._modules)))
        elif issubclass(type(value), UserDict):
            parts = frozenset([id(value.data)])
        if parts is not None or (issubclass(type(value), dict) and type(value) is not dict):
            with contextlib.suppress(AttributeError):
                attributes = object.__getattribute__(value, "__dict__")
    if attributes is not None:
        yield attributes, True, parts
    for child in gc.get_referents(value):
        # Python 3.13 does not show a dictionary of attributes whose values the object itself holds.
        if child is attributes and attributes is not None:
            continue
        if parts is not None:
            if id(child) in parts:
                yield child, True, None
        elif _is_tensor(child) or _is_container(child):
            yield child, False, None


def _empty(container: Any) -> None:
    if issubclass(type(container), dict):
        entries = cast(dict[Any, Any], container)
        held = set(map(id, dict[Any, Any].values(entries)))
        attributes: dict[str, Any] = {}
        with contextlib.suppress(AttributeError):
            attributes = object.__getattribute__(entries, "__dict__")
        # An output object of a model is a dictionary that has its entries as attributes too.
        for name in [name for name, value in attributes.items() if id(value) in held]:
            del attributes[name]
        dict[Any, Any].clear(entries)  # whatever its class makes of clear()
    else:
        container.clear()


# The caller's variables


def _variables_bound(frame: FrameType, nodes: Mapping[int, object], seen: list[FrameType]) -> Iterator[int]:
    """Which of the objects, by identity, each variable of a frame is bound to.

    A variable of the module counts where the frame's code names it, once for all frames; one that an
    inner function shares counts only while no such function exists.
    """
    code = frame.f_code
    if code.co_flags & inspect.CO_OPTIMIZED:
        variables = frame.f_locals
        for name in code.co_varnames:
            if name not in code.co_cellvars and name in variables and id(variables[name]) in nodes:
                yield id(variables[name])
        for name in code.co_cellvars:
            if name in variables and id(variables[name]) in nodes and _is_alone_in_cell(variables[name]):
                yield id(variables[name])
        # Python before 3.13 keeps this dictionary with the frame, which would keep every object in it
        # alive until the caller returns. Take the variables out, unless the caller holds it himself.
        if type(variables) is dict and sys.getrefcount(variables) <= _fresh_locals_references():
            for name in (*code.co_varnames, *code.co_cellvars, *code.co_freevars):
                variables.pop(name, None)
        del variables
    elif frame.f_locals is not frame.f_globals:
        yield from (id(value) for value in frame.f_locals.values() if id(value) in nodes)
    if not any(frame.f_globals is other.f_globals for other in seen):
        for name in code.co_names:
            if id(frame.f_globals.get(name)) in nodes:
                yield id(frame.f_globals[name])


def _fresh_locals_references() -> int:
    variables = cast(FrameType, inspect.currentframe()).f_locals
    return sys.getrefcount(variables)


def _is_alone_in_cell(value: Any) -> bool:
    """Whether one cell refers to the value, and only a running function's frame refers to that cell."""
    cells = [referrer for referrer in gc.get_referrers(value) if type(referrer) is CellType]
    return len(cells) == 1 and sys.getrefcount(cells[0]) <= _LONE_CELL_REFERENCES


def _lone_cell_references() -> int:
    value: list[None] = []

    def share() -> list[None]:
        return value

    del share
    cells = [referrer for referrer in gc.get_referrers(value) if type(referrer) is CellType]
    return sys.getrefcount(cells[0])


_LONE_CELL_REFERENCES = _lone_cell_references()


def _only_named(node: _Node, owned: set[int]) -> bool:
    """Whether only owned containers, and at most one name in each frame, refer to it."""
    if node.is_part:
        return node.others == 0 and all(key in owned for key in node.edges)
    named = node.others == node.names.total() and max(node.names.values(), default=0) <= 1
    return named and all(key in owned for key in node.edges)


# Why a tensor may not be freed


def _why_not_plain(tensor: Any) -> str | None:
    """Why a tensor has no storage that could be looked at, or ``None`` if it has."""
    torch: Any = sys.modules["torch"]
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return f"it is a {type(tensor).__name__}, of which only plain tensors and parameters can be freed"
    if torch._is_functional_tensor(tensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "it stands for another tensor while torch transforms a function"
    if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.is_nested:
        return "it has no memory of its own here (meta, sparse or nested)"
    return None


def _why_not(node: _Node, owned: set[int]) -> str | None:
    """Why a plain tensor may not be freed, or ``None`` if it may."""
    tensor = node.value
    torch: Any = sys.modules["torch"]
    if tensor._is_view():
        return "it is a view of another tensor"
    if tensor._use_count() != 1:
        return "a view, a graph that saved it for backward, or native code holds it"
    if torch._C._is_cow_tensor(tensor):
        return "it shares its memory with a lazy copy"
    storage = tensor.untyped_storage()
    if torch._C._storage_Use_Count(storage._cdata) != _fresh_storage_counts()[0]:
        return "another tensor, a numpy array or a graph shares its storage"
    if sys.getrefcount(storage) > _fresh_storage_counts()[1]:
        return "its storage object is held"
    if not storage.resizable():
        return "its memory belongs to another library, such as numpy, or was lent to one"
    if not tensor.is_cuda and storage.is_shared():
        return "it is in memory shared with other processes"
    if weakref.getweakrefcount(tensor):
        return "it is referred to weakly, as from a cache"
    if not _only_named(node, owned):
        return _describe_others(node, owned)
    return None


@functools.cache
def _fresh_storage_counts() -> tuple[int, int]:
    """Uses in native code, and references to the Python object, of a storage that one tensor has."""
    torch: Any = sys.modules["torch"]
    tensor = torch.empty(1, device="cpu")
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage)


def _describe_others(node: _Node, owned: set[int]) -> str:
    if any(key not in owned for key in node.edges):
        return "it is in a container that somebody else holds too"
    unnamed = node.others - node.names.total()
    if unnamed <= 0:
        return f"{node.names.total()} variables of the caller are bound to it; delete all but one"
    return (
        f"{unnamed} more {'references' if unnamed > 1 else 'reference'} to it: an attribute, another "
        "container, another function's variable, or one that an inner function shares"
    )


def _weak_reference(storage: Any) -> Any:
    from torch.multiprocessing.reductions import StorageWeakRef

    return StorageWeakRef(storage)


_freed_tensor: type | None = None


def _free_in_place(torch: Any, tensor: Any) -> None:
    """Make a tensor let go of its storage, gradient and graph, and refuse every later use."""
    global _freed_tensor
    if _freed_tensor is None:
        from av_memory._freed import FreedTensor

        _freed_tensor = FreedTensor
    with torch.no_grad():
        if not tensor.is_leaf:
            tensor.detach_()
        tensor.grad = None
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    tensor.__class__ = _freed_tensor


# Other memory


def _empty_cuda_cache() -> int:
    cuda = initialised_cuda()
    if cuda is None:
        return 0
    devices = range(cuda.device_count())
    before = sum(int(cuda.memory_reserved(index)) for index in devices)
    cuda.empty_cache()
    return before - sum(int(cuda.memory_reserved(index)) for index in devices)


def _stop_workers(dataloader: Any) -> int:
    """End the worker processes of a loader; they live on only with ``persistent_workers`` or an iterator."""
    data = sys.modules.get("torch.utils.data")
    if data is None or not isinstance(dataloader, data.DataLoader):
        raise TypeError(f"dataloader is a {type(dataloader).__name__}, not a torch.utils.data.DataLoader")
    iterator = dataloader._iterator
    # Besides the loader, this variable and getrefcount's argument, a loop that is under way refers to it.
    if iterator is None or sys.getrefcount(iterator) > 3:
        return 0
    workers = [worker for worker in getattr(iterator, "_workers", []) if worker.is_alive()]
    shut_down = getattr(iterator, "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()
    dataloader._iterator = None
    return sum(not worker.is_alive() for worker in workers)
