"""Giving memory back: what a caller hands over is let go, and said with reasons where it cannot be.

A function cannot delete its caller's variable. It can empty a list or dictionary in place, and it can
make a tensor let go of its storage. The second is done only where nobody can miss it: where the tensor
is its storage's only owner, and one variable of the caller, besides the containers that were handed
over, is all that refers to the tensor. Every other tensor is left as it is.
"""

from __future__ import annotations

import gc
import inspect
import sys
from collections import Counter, UserDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import FrameType
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
      afterwards raises** ``RuntimeError`` (``torch.tensor(x)`` alone is beyond reach: it sees an empty
      tensor). The graph of a result that has a ``grad_fn`` goes with it.
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
            that you hold yourself end with it. The dataset is left alone.
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


@dataclass(slots=True, eq=False)
class _Node:
    """One object within what was handed over, and who refers to it."""

    value: Any
    edges: Counter[int] = field(default_factory=Counter[int])
    """How often each container, by identity, refers to it."""
    names: int = 0
    """Variables of the caller that are bound to it."""
    others: int = 0
    """References from anywhere else than ``edges``."""


def _references(node: _Node) -> int:
    return sys.getrefcount(node.value)


# What getrefcount says of an object that only a node refers to.
_OWN_REFERENCES = _references(_Node(object()))


@dataclass(slots=True, eq=False)
class _StorageFate:
    """A storage to look at again when everything is done."""

    size_bytes: int
    what: str
    reference: Any
    reason: str = (
        "something that was not found still refers to it; a second look with collect=True may free it"
    )


class _HandedOver:
    def __init__(self, roots: list[Any]) -> None:
        self.nothing = not roots
        self.on_gpu = False
        self._storages: dict[int, _StorageFate] = {}
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
        self._nodes[id(root.value)] = root
        pending = [root]
        while pending:
            parent = pending.pop()
            for child in _children(parent.value):
                if not _is_container(child) and not _is_tensor(child):
                    continue
                node = self._nodes.get(id(child))
                if node is None:
                    node = self._nodes[id(child)] = _Node(child)
                    pending.append(node)
                node.edges[id(parent.value)] += 1

    def let_go(self, frames: list[FrameType]) -> None:
        """Empty the containers that only the caller holds, and free the tensors that nobody can miss."""
        if self._root is None:
            return
        bound = _names_bound(frames, self._nodes.keys())
        for key, node in self._nodes.items():
            node.names = bound[key]
            node.others = _references(node) - _OWN_REFERENCES - node.edges.total()
        owned = self._owned_containers(len(frames))
        torch = sys.modules.get("torch")
        tensors = [node for node in self._nodes.values() if _is_tensor(node.value)]
        for node in tensors:
            fate = self._watch(node.value)
            reason = _why_not(node, owned, len(frames))
            if reason is None:
                _free_in_place(torch, node.value)
            elif fate is not None:
                fate.reason = reason
        containers: list[Any] = [
            node.value
            for key, node in self._nodes.items()
            if key in owned and isinstance(node.value, _EMPTIED)
        ]
        tensors.clear()
        self._nodes.clear()
        for container in containers:
            _empty(container)

    def _owned_containers(self, frame_count: int) -> set[int]:
        """Containers that nobody but the caller's one name, and other such containers, refers to."""
        candidates = {key: node for key, node in self._nodes.items() if not _is_tensor(node.value)}
        owned = set(candidates)
        while True:
            lost = {
                key
                for key in owned
                if not (key == self._root and not _is_module(candidates[key].value))
                and not _only_named(candidates[key], owned, frame_count)
            }
            if not lost:
                return owned
            owned -= lost

    def _watch(self, tensor: Any) -> _StorageFate | None:
        fate = None
        for one in (tensor, tensor.grad if tensor.is_leaf else None):
            if one is None or not _has_plain_storage(one):
                continue
            storage = one.untyped_storage()
            self.on_gpu = self.on_gpu or one.is_cuda
            if storage.nbytes() == 0:
                continue
            watched = self._storages.get(storage._cdata)
            if watched is None:
                what = f"{type(one).__name__} {tuple(one.shape)} {str(one.dtype).removeprefix('torch.')}"
                watched = self._storages[storage._cdata] = _StorageFate(
                    storage.nbytes(),
                    what + ("" if one is tensor else " (gradient)"),
                    _weak_reference(storage),
                )
            fate = fate or watched
        return fate

    def outcome(self) -> tuple[int, list[Kept]]:
        freed, left = 0, self._beyond_reach.copy()
        for fate in self._storages.values():
            if fate.reference.expired():
                freed += fate.size_bytes
            else:
                left.append(Kept(fate.size_bytes, fate.what, fate.reason))
        return freed, left


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor) and type(value) is not _freed_tensor


def _is_module(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


_EMPTIED: tuple[type[Any], ...] = (list, dict, set, deque, UserDict)


def _is_container(value: Any) -> bool:
    return isinstance(value, (*_EMPTIED, tuple, frozenset)) or _is_module(value)


def _children(value: Any) -> list[Any]:
    """What a container holds, each as often as it holds it."""
    if isinstance(value, dict):
        entries = cast(dict[Any, Any], value)
        # An output object of a model is a dictionary that has its entries as attributes too.
        return [*entries.values(), *getattr(entries, "__dict__", {}).values()]
    if isinstance(value, UserDict):
        return list(cast(UserDict[Any, Any], value).data.values())
    if _is_module(value):
        held = (value._parameters, value._buffers, value._modules)
        return [child for group in held for child in group.values() if child is not None]
    return [] if _is_tensor(value) else list(value)


def _empty(container: Any) -> None:
    if isinstance(container, dict):
        entries = cast(dict[Any, Any], container)
        held = {id(entry) for entry in entries.values()}
        attributes: dict[str, Any] = getattr(entries, "__dict__", {})
        for name in [name for name, value in attributes.items() if id(value) in held]:
            del attributes[name]
        dict[Any, Any].clear(entries)  # whatever its class makes of clear()
    else:
        container.clear()


def _names_bound(frames: list[FrameType], keys: Iterable[int]) -> Counter[int]:
    """How many variables of these frames are bound to each object, by identity."""
    wanted = set(keys)
    bound = Counter[int]()
    for frame in frames:
        is_function = bool(frame.f_code.co_flags & inspect.CO_OPTIMIZED)
        variables = frame.f_locals
        bound.update(id(value) for value in variables.values() if id(value) in wanted)
        if is_function:
            # Python before 3.13 keeps this dictionary with the frame, which would keep every object in
            # it alive until the caller returns. Blank it, unless the caller holds it through locals().
            if type(variables) is dict and sys.getrefcount(variables) == _FRESH_LOCALS_REFERENCES:
                variables.clear()
            variables = frame.f_globals
            for name in frame.f_code.co_names:
                value = variables.get(name)
                if id(value) in wanted:
                    bound[id(value)] += 1
        del variables
    return bound


def _fresh_locals_references() -> int:
    variables = cast(FrameType, inspect.currentframe()).f_locals
    return sys.getrefcount(variables)


_FRESH_LOCALS_REFERENCES = _fresh_locals_references()


def _only_named(node: _Node, owned: set[int], frame_count: int) -> bool:
    """Whether only owned containers, and at most one name in each frame, refer to it."""
    foreign = sum(count for key, count in node.edges.items() if key not in owned)
    return foreign == 0 and node.others == node.names and node.names <= frame_count


def _why_not(node: _Node, owned: set[int], frame_count: int) -> str | None:
    """Why a tensor may not be freed, or ``None`` if it may."""
    tensor = node.value
    torch: Any = sys.modules["torch"]
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return f"it is a {type(tensor).__name__}, of which only plain tensors and parameters can be freed"
    if not _has_plain_storage(tensor):
        return "it has no memory of its own here (meta, sparse or nested)"
    if tensor._is_view():
        return "it is a view of another tensor"
    if tensor._use_count() != 1:
        return "a view, a graph that saved it for backward, or native code holds it"
    storage = tensor.untyped_storage()
    if torch._C._storage_Use_Count(storage._cdata) != _OWN_STORAGE_USES:
        return "another tensor, a numpy array or a graph shares its storage"
    if not storage.resizable():
        return "its memory belongs to another library or process"
    if not _only_named(node, owned, frame_count):
        return _describe_others(node, owned)
    return None


# The tensor's own use, and that of the Python object through which it is looked at.
_OWN_STORAGE_USES = 2


def _describe_others(node: _Node, owned: set[int]) -> str:
    foreign = sum(count for key, count in node.edges.items() if key not in owned)
    if foreign:
        return "it is in a container that somebody else holds too"
    unnamed = node.others - node.names
    if unnamed <= 0:
        return f"{node.names} variables of the caller are bound to it; delete all but one"
    return (
        f"{unnamed} more {'references' if unnamed > 1 else 'reference'} to it: "
        "an attribute, another container, or another function's variable"
    )


def _has_plain_storage(tensor: Any) -> bool:
    torch: Any = sys.modules["torch"]
    return bool(tensor.layout == torch.strided and tensor.device.type != "meta" and not tensor.is_nested)


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
        if tensor.is_leaf:
            tensor.grad = None
        else:
            tensor.detach_()
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
    if iterator is None:
        return 0
    workers = [worker for worker in getattr(iterator, "_workers", []) if worker.is_alive()]
    shut_down = getattr(iterator, "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()
    dataloader._iterator = None
    return sum(not worker.is_alive() for worker in workers)
