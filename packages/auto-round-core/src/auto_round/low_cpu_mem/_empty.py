"""A transformers model without weights: parameters on the meta device, everything that is computed real."""

from __future__ import annotations

import functools
import importlib
import os
import re
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from auto_round._files import read_json_object, shown
from auto_round.exceptions import CheckpointError, ConfigurationError, MissingPackageError
from auto_round.low_cpu_mem._checkpoint import CheckpointReader

_MOST_CONFIG_BYTES = 10_000_000
_TRUST = "pass trust_remote_code=True if you trust that code like a program that you start"
# Two models being built at once would undo each other's changes to torch's and transformers' classes.
_BUILDING = threading.RLock()


def import_transformers() -> Any:
    """Return the module `transformers`.

    Raises:
        MissingPackageError: It is not installed.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise MissingPackageError(
            'models are built by transformers, which is missing; run `pip install "transformers>=4.57,<6"`.',
            name="transformers",
        ) from error


def model_folder(path: str | PathLike[str]) -> Path:
    """Return the folder that a path or the name of a downloaded model on the Hugging Face hub stands for.

    Nothing is downloaded.

    Raises:
        CheckpointError: There is no such folder, and no such model in the local cache of the hub.
    """
    folder = Path(path)
    if not os.fspath(path) or "\0" in str(folder):
        raise CheckpointError(
            f"the path {shown(path)} is empty or has a zero byte; give the folder that has the model's "
            "config.json."
        )
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; give the folder that has the model's config.json.")
    if isinstance(path, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        import_transformers()
        hub: Any = importlib.import_module("huggingface_hub")
        try:
            return Path(hub.snapshot_download(path, local_files_only=True))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} is neither a folder nor a model in the local cache of the Hugging Face hub; run "
                f"`hf download {path}` first."
            ) from error
    raise CheckpointError(f"{folder} does not exist; give the folder that has the model's config.json.")


def empty_model(
    path: str | PathLike[str],
    model_class: Any = None,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Build the model of a checkpoint without its weights.

    Parameters and persistent buffers, which the checkpoint has, are on the meta device. Buffers that are
    computed (rotary frequencies, scales of embeddings, position ids) are on the CPU with the values that they
    have in a loaded model. Tied parameters are one object. The model is in evaluation mode.

    While the model is built, torch's default dtype is that of the model, in all threads.

    Args:
        path: Folder with a `config.json`, or the name of a model in the local cache of the Hugging Face hub.
        model_class: A model class of transformers, or one of its Auto classes. By default the class that
            `architectures` in the configuration names, or else `AutoModelForCausalLM`.
        dtype: Of the parameters. By default what the configuration says, or else what the first weights in
            the checkpoint have. Modules that transformers keeps in float32 stay in it.
        trust_remote_code: Run the model code that the folder or the hub brings, if the checkpoint wants
            that. Such code can do whatever the user of the process may do.
        kwargs: Attributes of the configuration that are to differ, such as `attn_implementation`.

    Raises:
        CheckpointError: The configuration is missing, damaged, of an unknown model type, needs code that is
            not trusted, or says that the weights are quantised.
        ConfigurationError: An argument is none that transformers knows, or is impossible.
        MissingPackageError: transformers is not installed; it is an `ImportError` too.
    """
    transformers = import_transformers()
    folder = model_folder(path)
    if dtype is not None and not dtype.is_floating_point:
        raise ConfigurationError(f"dtype is {dtype}; a model's parameters need a floating-point type.")
    config = _read_config(transformers, folder, trust_remote_code, kwargs)
    chosen = _choose_class(transformers, config, model_class, trust_remote_code)
    dtype = dtype or _stored_dtype(config, folder)
    config.dtype = dtype
    if hasattr(chosen, "from_config"):
        make, options = chosen.from_config, {"dtype": dtype, "trust_remote_code": trust_remote_code}
    else:
        make, options = chosen._from_config, {"dtype": dtype}
    with _parameters_on_meta(transformers.PreTrainedModel):
        try:
            model = _build_without_memory(functools.partial(make, config, **options))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{folder / 'config.json'} describes no model that {chosen.__name__} can build: {error}"
            ) from error
    _keep_in_float32(model, dtype)
    _persistent_buffers_to_meta(model)
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(folder))
    return cast("nn.Module", model.eval())


def _read_config(transformers: Any, folder: Path, trust_remote_code: bool, changes: dict[str, Any]) -> Any:
    path = folder / "config.json"
    raw = read_json_object(path, CheckpointError, _MOST_CONFIG_BYTES)
    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError(f"{path} has no model_type, so it does not say which model it describes.")
    quantised = raw.get("quantization_config")
    if quantised is not None:
        fields = cast("dict[str, Any]", quantised) if isinstance(quantised, dict) else {}
        raise CheckpointError(
            f"{path} says that the weights are quantised already, by {shown(fields.get('quant_method'))}; "
            f"give the checkpoint with floating-point weights that it was made from."
        )
    auto_map = raw.get("auto_map")
    brings_code = isinstance(auto_map, dict) and "AutoConfig" in auto_map
    if kind not in transformers.CONFIG_MAPPING and not (brings_code and trust_remote_code):
        remedy = (
            f"the folder brings code for it; {_TRUST}" if brings_code else "a newer transformers may know it"
        )
        raise CheckpointError(
            f"{path}: transformers {transformers.__version__} has no model_type {shown(kind)}; {remedy}."
        )
    hub_errors: Any = importlib.import_module("huggingface_hub.errors")
    try:
        config, unused = transformers.AutoConfig.from_pretrained(
            str(folder),
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            return_unused_kwargs=True,
            **changes,
        )
    except (ValueError, TypeError, KeyError, AttributeError, hub_errors.StrictDataclassError) as error:
        raise CheckpointError(f"{path} is no valid configuration of a {kind} model: {error}") from error
    if unused:
        raise ConfigurationError(
            f"{', '.join(sorted(unused))}: the configuration of a {kind} model has no such attribute."
        )
    return config


def _choose_class(transformers: Any, config: Any, model_class: Any, trust_remote_code: bool) -> Any:
    if model_class is not None:
        if not (hasattr(model_class, "from_config") or hasattr(model_class, "_from_config")):
            raise ConfigurationError(
                f"model_class is {shown(model_class)}; it must be a model class of transformers or one of "
                f"its Auto classes, such as AutoModelForCausalLM."
            )
        return model_class
    if trust_remote_code:
        auto_map: dict[str, Any] = getattr(config, "auto_map", None) or {}
        for name in auto_map:
            if name.startswith("AutoModel"):
                return getattr(transformers, name)
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            known: Any = found
            if isinstance(config, known.config_class):
                return known
    return transformers.AutoModelForCausalLM


def _stored_dtype(config: Any, folder: Path) -> torch.dtype:
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    with CheckpointReader(folder) as reader:
        found = (reader.info(name).dtype for name in reader.names)
        return next((dtype for dtype in found if dtype.is_floating_point), torch.get_default_dtype())


@contextmanager
def _parameters_on_meta(base_class: Any) -> Generator[None]:
    """Have this thread's modules move each parameter to meta as they register it, and fill none.

    The device context of torch would send buffers to meta as well, and only the newest transformers can
    compute these again.
    """
    builder = threading.get_ident()

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta" and threading.get_ident() == builder:
            real = param
            param = nn.Parameter(real.detach().to("meta"), requires_grad=real.requires_grad)
            # Marks that transformers sets on parameters.
            vars(param).update(vars(real))
        original_register(self, name, param)

    def initialize(model: Any, *args: Any, **kwargs: Any) -> None:
        if threading.get_ident() != builder:
            original_initialize(model, *args, **kwargs)

    with _BUILDING:
        original_register = nn.Module.register_parameter
        original_initialize = base_class.initialize_weights
        nn.Module.register_parameter = register
        base_class.initialize_weights = initialize
        try:
            yield
        finally:
            nn.Module.register_parameter = original_register
            base_class.initialize_weights = original_initialize


class _EmptyOnMeta(TorchFunctionMode):
    """Sends `torch.empty`, which is how torch begins a weight, to meta at once. For this thread alone."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _build_without_memory(build: Callable[[], Any]) -> Any:
    """Build a model; its weights are not even allocated, unless it computes with what torch calls empty."""
    # Weights that are allocated and freed, though never touched, leave holes in glibc's heap. Later blocks
    # come from these, and stay resident when they are freed.
    try:
        with _EmptyOnMeta():
            model = build()
    except RuntimeError:
        return build()
    computed = (buffer for module in model.modules() for buffer in _computed_buffers(module).values())
    return build() if any(buffer.is_meta for buffer in computed) else model


def _keep_in_float32(model: Any, dtype: torch.dtype) -> None:
    """Follow what transformers says of modules that lose too much in 16 bits."""
    names: set[str] = set()
    if dtype == torch.float16:
        names.update(getattr(model, "_keep_in_fp32_modules", None) or ())
    if dtype in (torch.float16, torch.bfloat16):
        names.update(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if not names:
        return
    pattern = re.compile(rf"(?:^|\.)(?:{'|'.join(name.replace('*', '.*') for name in names)})(?:\.|$)")
    for name, parameter in cast("nn.Module", model).named_parameters():
        if pattern.search(name) and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32)


def _persistent_buffers_to_meta(model: nn.Module) -> None:
    for module in model.modules():
        for name, buffer in persistent_buffers(module).items():
            setattr(module, name, buffer.to("meta"))


def _computed_buffers(module: nn.Module) -> dict[str, Tensor]:
    stored = persistent_buffers(module)
    return {name: buffer for name, buffer in module.named_buffers(recurse=False) if name not in stored}


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a module itself that its state dict has."""
    computed = module._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]
    return {name: buffer for name, buffer in module.named_buffers(recurse=False) if name not in computed}
