"""Hooks by which a model's weights come when a module is called and go when it is done."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Protocol, cast

import av_memory
import torch
from torch import Tensor, nn

from auto_round.config_manager import get_config
from auto_round.exceptions import ConfigurationError
from auto_round.low_cpu_mem._batches import run_in_parts
from auto_round.low_cpu_mem._checkpoint import CheckpointReader
from auto_round.low_cpu_mem._empty import model_folder, persistent_buffers
from auto_round.low_cpu_mem._host_weights import HostWeights
from auto_round.low_cpu_mem._spill import open_in_parts
from auto_round.low_cpu_mem._streamed import StreamedWeight
from auto_round.low_cpu_mem._tensor_utils import TensorUtils
from auto_round.low_cpu_mem._weights import named_modules

STREAMED_BYTES = 32 << 20
"""A linear layer with a larger weight computes in chunks of its rows."""
# The C library keeps what is freed where its heap has holes that are large enough, as it has after the
# imports of large libraries. Giving that back takes 0.05 to 2 ms.
_TRIMMED_BYTES = 8 << 20


class Handle(Protocol):
    """Something that was attached to the model."""

    def remove(self) -> None:
        """Take it away again."""
        ...


class HookManager:
    """Gives a model on the meta device its weights while it computes.

    When a module is called, the parameters and persistent buffers that it has itself come from the
    checkpoint, and with `clean_weights` they go when it is done. An embedding reads only the rows of the
    tokens that are there, and a linear layer with more than `STREAMED_BYTES` of weights computes in chunks of
    rows; such a weight is a `StreamedWeight` while the hooks are there. Weights take no gradient, and what is
    loaded in the model already is left as it is.

    Any number of threads may run the model at once: a module's weights stay until the last of them is done
    with it. An exception in a forward pass leaves nothing loaded.

    With `clean_weights` av-memory tunes the C library's allocator once for the process, since otherwise glibc
    keeps what is freed; `av_memory.tune_allocator` says what that costs.

    On a GPU, `get_config().memory` counts as it is when the hooks are registered. With `use_cpu_offload`
    weights that were read once are kept in the computer's memory, pinned, and copied from there, which takes
    as much of it as the whole model; without, they are read again each time. A batch of more than
    `gpu_batch_size` samples is split as `run_in_parts` says. Neither does anything on a CPU. The model's
    inputs are moved to the GPU.

    A model that uses a weight of one of its modules without calling the module cannot be run like this, but
    for embeddings and large linear layers, and torch's own `MultiheadAttention`.

    Args:
        model: As `empty_model` returns it, or any module on the meta device.
        path: Folder of the checkpoint, or the name of a model in the local cache of the Hugging Face hub.
        device: Where to compute; see `TensorUtils.detect_device`.
        clean_weights: Let weights go once a module is done. Otherwise they stay from its first call on.
        save_path: Folder for what cannot be read in parts where it is, which is torch files from before 1.6:
            they are converted there, and removed with this object. By default `memory.workspace_dir`, or
            else the system's temporary folder. Nothing else is ever written.
        reader: The checkpoint at `path`, where it is open already.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, or not of this model.
        ConfigurationError: The device is not there.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str | PathLike[str],
        device: str | int | torch.device | None = "auto",
        clean_weights: bool = True,
        save_path: str | PathLike[str] | None = None,
        *,
        reader: CheckpointReader | None = None,
    ) -> None:
        self.model = model
        """The model."""
        self.device = TensorUtils.detect_device(device)
        """Where it computes."""
        self.clean_weights = clean_weights
        """Whether weights go once a module is done."""
        self.handles: list[Handle] = []
        """What is attached to the model now; empty before `register_hooks` and after `remove_hooks`."""
        if reader is None:
            reader = open_in_parts(model_folder(path), save_path)
        self._weights = HostWeights(model, reader)
        self._units: dict[nn.Module, _Unit] = {}
        self._entered = _Entered()
        self._freed = 0

    def register_hooks(self) -> list[Handle]:
        """Attach everything to the model, unless that is done, and return `handles`.

        Raises:
            ConfigurationError: Another manager's hooks are on the model.
        """
        if self.handles:
            return self.handles
        if isinstance(vars(self.model).get("forward"), _GuardedForward):
            raise ConfigurationError(
                "the model has the hooks of another HookManager; call its remove_hooks() first."
            )
        memory = get_config().memory
        on_gpu = self.device.type == "cuda"
        if self.clean_weights:
            av_memory.tune_allocator()
        self._weights.keep = on_gpu and self.clean_weights and memory.use_cpu_offload
        self._attach(memory.gpu_batch_size if on_gpu else None)
        return self.handles

    def remove_hooks(self) -> None:
        """Take everything away from the model. No thread may be in a forward pass.

        With `clean_weights` the model is as it was before; without, what was loaded stays.
        """
        while self.handles:
            self.handles.pop().remove()
        for unit in self._units.values():
            if self.clean_weights:
                self._unload(unit)
        self._units.clear()

    def pre_forward_hook(self, module: nn.Module, input: Any) -> None:  # noqa: A002 - the contract's name
        """Load what `module` itself has, or count one more user of it where that is loaded.

        Args:
            module: A module of the model.
            input: Its inputs, which are not looked at.

        Raises:
            CheckpointError: The weights cannot be read; nothing is loaded then.
        """
        del input
        unit = self._units.get(module)
        if unit is None:
            return
        with unit.lock:
            if not unit.loaded:
                self._load(unit)
            unit.users += 1
        self._entered.units.append(unit)

    def post_forward_hook(self, module: nn.Module, input: Any, output: Any) -> None:  # noqa: A002
        """Undo one `pre_forward_hook` of this thread: the last user's call unloads the weights.

        Args:
            module: A module of the model. Where this thread has not loaded it, nothing happens.
            input: Its inputs, which are not looked at.
            output: Its outputs, which are not looked at.
        """
        del input, output
        unit = self._units.get(module)
        entered = self._entered.units
        if unit is not None and unit in entered:
            entered.remove(unit)
            self._leave(unit)

    def _attach(self, batch_limit: int | None) -> None:
        try:
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.requires_grad_(False)
                    self.handles.append(_Undo(functools.partial(parameter.requires_grad_, True)))
            self._move_what_is_real()
            for path, module in named_modules(self.model):
                if self.clean_weights and _is_streamed(module):
                    self._stream(path, module)
            for path, module in named_modules(self.model):
                tensors = _own_tensors(module)
                if any(
                    tensor.is_meta and not isinstance(tensor, StreamedWeight) for tensor in tensors.values()
                ):
                    caller = self._caller_of(path)
                    unit = self._units.setdefault(caller, _Unit())
                    unit.parts[path] = module, {n: t for n, t in tensors.items() if not t.is_meta}
                    unit.nbytes += sum(t.nbytes for t in tensors.values() if t.is_meta)
            for module in self._units:
                self.handles.append(module.register_forward_pre_hook(self.pre_forward_hook))
                # After an exception too.
                self.handles.append(module.register_forward_hook(self.post_forward_hook, always_call=True))
            self._load_first()
            guarded = _GuardedForward(
                self.model.forward, self.device, batch_limit, self._leave_all, self._trim
            )
            before = vars(self.model).get("forward")
            self.model.forward = guarded
            self.handles.append(_Undo(functools.partial(_restore_forward, self.model, before)))
        except BaseException:
            self.remove_hooks()
            raise

    def _load_first(self) -> None:
        """Load what the model says its device by, where that is not streamed and stays anyway."""
        first = next(iter(self._units), None)
        if first is not None and not self.clean_weights:
            self._load(self._units[first])

    def _stream(self, path: str, module: nn.Module) -> None:
        meta = cast("nn.Parameter", module.weight)
        name = f"{path}.weight" if path else "weight"
        read = functools.partial(self._weights.read_rows, name, dtype=meta.dtype)
        module.weight = StreamedWeight.of(meta, read, self.device)
        self.handles.append(_Undo(functools.partial(setattr, module, "weight", meta)))

    def _move_what_is_real(self) -> None:
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:
                    setattr(module, name, buffer.to(self.device))
            for parameter in module.parameters(recurse=False):
                if not parameter.is_meta:
                    parameter.data = parameter.data.to(self.device)

    def _caller_of(self, path: str) -> nn.Module:
        """Return the module whose call uses what the module at `path` has."""
        module = self.model.get_submodule(path)
        parent = self.model.get_submodule(path.rpartition(".")[0]) if path else module
        # torch's attention takes the weights of its last layer without calling it; lists are never called.
        called = type(module).forward is not nn.Module.forward
        if not path or (called and not isinstance(parent, nn.MultiheadAttention)):
            return module
        return self._caller_of(path.rpartition(".")[0])

    def _load(self, unit: _Unit) -> None:
        try:
            for path, (module, _) in unit.parts.items():
                self._weights.load_module(module, path, device=self.device, recurse=False)
        except BaseException:
            self._unload(unit)
            raise
        unit.loaded = True

    def _unload(self, unit: _Unit) -> None:
        for module, kept in unit.parts.values():
            self._weights.unload_module(module, recurse=False)
            for name, tensor in kept.items():
                setattr(module, name, tensor)
        unit.loaded = False

    def _leave(self, unit: _Unit) -> None:
        with unit.lock:
            unit.users -= 1
            if self.clean_weights and not unit.users:
                self._unload(unit)
                self._freed += unit.nbytes
        if self._freed >= _TRIMMED_BYTES:
            self._trim()

    def _trim(self) -> None:
        if self.clean_weights:
            self._freed = 0
            av_memory.trim_heap()

    def _leave_all(self) -> None:
        """Undo every `pre_forward_hook` of this thread that is not undone yet."""
        entered = self._entered.units
        while entered:
            self._leave(entered.pop())


def register_hooks(
    model: nn.Module,
    path: str | PathLike[str],
    device: str | int | torch.device | None = "auto",
    clean_weights: bool = True,
    save_path: str | PathLike[str] | None = None,
) -> HookManager:
    """Attach hooks to a model on the meta device, and return their manager, which can remove them.

    Args:
        model: As for `HookManager`.
        path: As for `HookManager`.
        device: As for `HookManager`.
        clean_weights: As for `HookManager`.
        save_path: As for `HookManager`.

    Raises:
        CheckpointError: As for `HookManager`.
        ConfigurationError: As for `HookManager`; or the model has another manager's hooks.
    """
    manager = HookManager(model, path, device, clean_weights, save_path)
    manager.register_hooks()
    return manager


@dataclass(eq=False, slots=True)
class _Unit:
    """What comes and goes with the calls of one module."""

    parts: dict[str, tuple[nn.Module, dict[str, Tensor]]] = field(
        default_factory=dict[str, "tuple[nn.Module, dict[str, Tensor]]"]
    )
    """By path, modules whose own tensors are needed, and those of them that were there before."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    nbytes: int = 0
    """At most so much is loaded."""
    users: int = 0
    loaded: bool = False


class _Entered(threading.local):
    """What the current thread is in, outermost first."""

    def __init__(self) -> None:
        self.units: list[_Unit] = []


@dataclass(frozen=True, slots=True)
class _Undo:
    remove: Callable[[], Any]


class _GuardedForward:
    """The model's forward: inputs are moved, large batches split, and nothing stays after an exception."""

    def __init__(
        self,
        forward: Callable[..., Any],
        device: torch.device,
        batch_limit: int | None,
        leave_all: Callable[[], None],
        trim: Callable[[], None],
    ) -> None:
        self._forward = forward
        self._device = device
        self._batch_limit = batch_limit
        self._leave_all = leave_all
        self._trim = trim
        # transformers looks at the signature.
        functools.update_wrapper(self, forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            if self._device.type != "cpu":
                args, kwargs = _moved(args, self._device), _moved(kwargs, self._device)
            return run_in_parts(self._forward, args, kwargs, self._batch_limit)
        except BaseException:
            # torch calls hooks after an Exception; this is for the others, such as Ctrl-C.
            self._leave_all()
            raise
        finally:
            self._trim()


def _restore_forward(model: nn.Module, before: Any) -> None:
    with suppress(KeyError):
        del vars(model)["forward"]
    if before is not None:
        model.forward = before


def _is_streamed(module: nn.Module) -> bool:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None or not weight.is_meta:
        return False
    large = weight.numel() * weight.element_size() > STREAMED_BYTES
    return isinstance(module, nn.Embedding) or (isinstance(module, nn.Linear) and large)


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(recurse=False)), **persistent_buffers(module)}


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(item, device) for name, item in cast("dict[str, Any]", value).items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(item, device) for item in value)
    return value
