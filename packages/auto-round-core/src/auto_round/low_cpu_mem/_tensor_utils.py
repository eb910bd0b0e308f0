"""Saving the tensors of modules, and putting tensors into modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

import av_memory
import torch
from av_memory import Release
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from auto_round._files import shown, write_atomically
from auto_round.exceptions import CheckpointError, ConfigurationError
from auto_round.low_cpu_mem.pickle_wrapper import dump, load


class TensorUtils:
    """Functions on the tensors of modules; there is nothing to construct."""

    @staticmethod
    def save_tensor_state(module: nn.Module, path: str | PathLike[str]) -> None:
        """Write the parameters and persistent buffers of a module to a file.

        A path that ends in `.safetensors` gets that format, in which tied tensors are stored once for each of
        their names; any other gets the format of `torch.save`, tensors only. The file appears once it is
        complete and on disk, so a crash leaves the old one; its folder is made if it is missing.

        Raises:
            CheckpointError: A tensor is on the meta device and has no values.
            OSError: The file cannot be written.
        """
        path = Path(path)
        state: dict[str, Tensor] = {**module.state_dict()}
        for name, tensor in state.items():
            if tensor.is_meta:
                raise CheckpointError(
                    f"tensor {shown(name)} is on the meta device and has no values to save; load it first."
                )
        if path.suffix == ".safetensors":
            write_safetensors(state, path)
        else:
            dump(state, path)

    @staticmethod
    def load_tensor_state(path: str | PathLike[str]) -> dict[str, Tensor]:
        """Read what `save_tensor_state` wrote, or any other file that holds tensors by name, onto the CPU.

        Nothing in the file is run.

        Raises:
            CheckpointError: The file is missing or damaged, or holds something else than tensors by name.
            UnsafeFileError: The file names code.
        """
        return read_tensors_by_name(path)

    @staticmethod
    def set_module_tensor_to_device(
        module: nn.Module,
        param_name: str,
        device: str | int | torch.device,
        value: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Give a parameter or buffer of a module a value on a device.

        A tensor that is tied under several names within `module` stays tied.

        Args:
            module: The module.
            param_name: Name of the parameter or buffer; with dots, of one of a module within.
            device: Where to: as for `detect_device`, or "meta", which frees the values.
            value: The new values, in the same shape; by default those that are there.
            dtype: The type that floating-point values get. By default that of `value`.

        Raises:
            CheckpointError: There is no such tensor, `value` has another shape, or there are no values.
        """
        old = _find(module, param_name)
        if value is None and old.is_meta and str(device) != "meta":
            raise CheckpointError(
                f"{shown(param_name)} is on the meta device and has no values; pass `value` as well."
            )
        new = old.detach() if value is None else value.detach()
        if new.shape != old.shape:
            raise CheckpointError(
                f"{shown(param_name)} has shape {tuple(old.shape)}, but the value has {tuple(new.shape)}."
            )
        target = torch.device("meta") if str(device) == "meta" else TensorUtils.detect_device(device)
        new = new.to(target, dtype if dtype is not None and new.is_floating_point() else new.dtype)
        if isinstance(old, nn.Parameter):
            differentiable = old.requires_grad and (new.is_floating_point() or new.is_complex())
            new = nn.Parameter(new, requires_grad=differentiable)
        for holder in module.modules():
            for name, tensor in _own_tensors(holder).items():
                if tensor is old:
                    setattr(holder, name, new)

    @staticmethod
    def detect_device(device: str | int | torch.device | None = None) -> torch.device:
        """Return the device that is meant, having checked that it is there.

        Args:
            device: "cpu", "cuda" (torch's current one), "cuda:1" or just 1; "auto" or None for CUDA where
                torch sees a device of it, and else the CPU.

        Raises:
            ConfigurationError: It is none of these, or torch sees no such device.
        """
        given = str(device).strip() if isinstance(device, str | torch.device) else device
        if given is None or given == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if given == "cpu":
            return torch.device("cpu")
        if isinstance(given, int) and not isinstance(given, bool):
            given = f"cuda:{given}"
        found = re.fullmatch(r"cuda(?::(\d{1,4}))?", given) if isinstance(given, str) else None
        if found is None:
            raise ConfigurationError(
                f"device is {shown(device)}; it can be auto, cpu, cuda, cuda:N or the number N."
            )
        if torch.version.cuda is None and torch.version.hip is None:
            raise ConfigurationError(
                f"device is {shown(device)}, but torch {torch.__version__} is built without CUDA; use cpu, "
                f"or install a torch with CUDA."
            )
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise ConfigurationError(f"device is {shown(device)}, but torch sees no CUDA device; use cpu.")
        if found[1] is not None and int(found[1]) >= count:
            raise ConfigurationError(
                f"device is {shown(device)}, but torch sees {count} CUDA devices, numbered from 0."
            )
        return torch.device(given)

    @staticmethod
    def clear_memory(tensors: Any = None) -> Release:
        """Let go of tensors, collect garbage, and give free memory back; see `memory_utils.clear_memory`.

        Args:
            tensors: A tensor, a module or a container of such. Lists and dictionaries are emptied in place;
                a tensor that only one variable of the caller refers to is freed.

        Returns:
            What was freed, and what was kept and why.
        """
        return av_memory.clear_memory(tensors, stacklevel=2)


def read_tensors_by_name(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Return what `TensorUtils.load_tensor_state` does."""
    state: object = load(path)
    if isinstance(state, dict):
        entries = cast("dict[object, object]", state)
        if all(isinstance(key, str) and isinstance(value, Tensor) for key, value in entries.items()):
            return cast("dict[str, Tensor]", entries)
    raise CheckpointError(f"{path} does not hold tensors by name, but a {type(cast(Any, state)).__name__}.")


def write_safetensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors by name atomically; those that share memory once for each name."""
    apart = _without_shared_memory(state)
    write_atomically(path, lambda temporary: save_file(apart, temporary, metadata={"format": "pt"}))


def _find(module: nn.Module, path: str) -> Tensor:
    prefix, _, last = path.rpartition(".")
    try:
        owner = module.get_submodule(prefix)
    except AttributeError as error:
        raise CheckpointError(f"the module has no {shown(path)}: {error}.") from error
    found = _own_tensors(owner)
    if last not in found:
        raise CheckpointError(
            f"the module has no parameter or buffer {shown(path)}; {type(owner).__name__} has "
            f"{shown(tuple(found))}."
        )
    return found[last]


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    parameters = module.named_parameters(recurse=False, remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(recurse=False, remove_duplicate=False))}


def _without_shared_memory(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in state.items():
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.numel() * tensor.element_size()
        key = storage.data_ptr()
        alone = whole and (key == 0 or key not in seen)
        apart[name] = tensor if alone else tensor.clone(memory_format=torch.contiguous_format)
        seen.add(key)
    return apart
