"""From a checkpoint on disk to a model that computes in little memory."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch import nn

from auto_round.config_manager import get_config
from auto_round.low_cpu_mem._checkpoint import CheckpointReader
from auto_round.low_cpu_mem._empty import empty_model, model_folder
from auto_round.low_cpu_mem._hooks import HookManager
from auto_round.low_cpu_mem._spill import open_in_parts
from auto_round.low_cpu_mem._tensor_utils import TensorUtils
from auto_round.low_cpu_mem._weights import ModelWeights


class ModelConverter:
    """Loads models of one checkpoint so that their weights are in memory only while they are used.

    The weights are read straight from the checkpoint's files; there is no second copy of them on disk. What
    that means for threads, exceptions, GPUs and the allocator is in `HookManager`.

    Args:
        model_path: Folder of the checkpoint, or the name of a model in the local cache of the Hugging Face
            hub. Nothing is downloaded.
        model_class: A model class of transformers or one of its Auto classes. By default the class that the
            configuration names, or else `AutoModelForCausalLM`.
        device: Where the models compute; see `TensorUtils.detect_device`.
        save_path: Folder for what must be written; see `HookManager`.
        dtype: Of the weights; by default that of the checkpoint.
        trust_remote_code: Run model code that the checkpoint brings.
        kwargs: Attributes of the configuration that are to differ, such as `attn_implementation`.

    Raises:
        CheckpointError: There is no such folder.
        ConfigurationError: The device is not there.
    """

    def __init__(
        self,
        model_path: str | PathLike[str],
        model_class: Any = None,
        device: str | int | torch.device | None = "auto",
        save_path: str | PathLike[str] | None = None,
        *,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> None:
        self.model_path = model_folder(model_path)
        """Folder of the checkpoint."""
        self.device = TensorUtils.detect_device(device)
        """Where the models compute."""
        self.save_path = save_path
        """Folder for what must be written."""
        self.model: nn.Module | None = None
        """The converter's own model, once it is built."""
        self.hook_manager: HookManager | None = None
        """The hooks of the own model, while it has any."""
        self._reader: CheckpointReader | None = None
        self._model_class = model_class
        self._options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, **kwargs}

    def load_empty_model(self) -> nn.Module:
        """Build the model with all weights on the meta device, make it the own one, and return it.

        Raises:
            CheckpointError: As for `empty_model`.
            ConfigurationError: As for `empty_model`.
            MissingPackageError: transformers is not installed.
        """
        self.model = self._build()
        self.hook_manager = None
        return self.model

    def prepare_model_for_conversion(self) -> nn.Module:
        """Make the own model ready to be worked through layer by layer, and return it.

        Builds it unless that is done, compares all its parameters with the checkpoint, and has them take no
        gradient. The weights stay on the meta device.

        Raises:
            CheckpointError: As for `empty_model`; or a tensor is missing or has another shape.
        """
        model = self.model if self.model is not None else self.load_empty_model()
        if self.hook_manager is None:
            ModelWeights(model, self._open())
            model.requires_grad_(False)
        return model

    def add_hooks(self, clean_weights: bool = True) -> HookManager:
        """Attach hooks to the own model, in place of any that it has, and return their manager.

        Args:
            clean_weights: Let weights go once a module is done; otherwise they stay from its first call on.

        Raises:
            CheckpointError: As for `prepare_model_for_conversion`.
        """
        model = self.prepare_model_for_conversion()
        if self.hook_manager is not None:
            self.hook_manager.remove_hooks()
        self.hook_manager = self._hook(model, clean_weights)
        return self.hook_manager

    def load_model_with_hooks(self, clean_weights: bool = True) -> nn.Module:
        """Return the own model, which computes as if its weights were loaded.

        Args:
            clean_weights: As for `add_hooks`.

        Raises:
            CheckpointError: As for `prepare_model_for_conversion`.
        """
        self.add_hooks(clean_weights)
        return self.prepare_model_for_conversion()

    def convert(self, inplace: bool = False, *, clean_weights: bool | None = None) -> nn.Module:
        """Return a model for inference in little memory.

        Args:
            inplace: Attach the hooks to the own model and return that. Otherwise a new model of the
                checkpoint is built and returned, and the own one is left alone.
            clean_weights: As for `add_hooks`; by default `memory.clean_weights_after_use`.

        Raises:
            CheckpointError: As for `prepare_model_for_conversion`.
        """
        clean = get_config().memory.clean_weights_after_use if clean_weights is None else clean_weights
        if inplace:
            return self.load_model_with_hooks(clean)
        model = self._build()
        self._hook(model, clean)
        return model

    def _build(self) -> nn.Module:
        return empty_model(self.model_path, self._model_class, **self._options)

    def _open(self) -> CheckpointReader:
        if self._reader is None:
            self._reader = open_in_parts(self.model_path, self.save_path)
        return self._reader

    def _hook(self, model: nn.Module, clean_weights: bool) -> HookManager:
        manager = HookManager(
            model, self.model_path, self.device, clean_weights, self.save_path, reader=self._open()
        )
        manager.register_hooks()
        return manager


def convert_model(
    model_path: str | PathLike[str],
    model_class: Any = None,
    device: str | int | torch.device | None = "auto",
    save_path: str | PathLike[str] | None = None,
    clean_weights: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """Load a model for inference in little memory; `ModelConverter.load_model_with_hooks` in one call.

    Args:
        model_path: As for `ModelConverter`.
        model_class: As for `ModelConverter`.
        device: As for `ModelConverter`.
        save_path: As for `ModelConverter`.
        clean_weights: As for `ModelConverter.add_hooks`.
        kwargs: `dtype`, `trust_remote_code` and attributes of the configuration, as for `ModelConverter`.

    Raises:
        CheckpointError: As for `ModelConverter.load_model_with_hooks`.
        ConfigurationError: As for `ModelConverter.load_model_with_hooks`.
        MissingPackageError: transformers is not installed.
    """
    converter = ModelConverter(model_path, model_class, device, save_path, **kwargs)
    return converter.load_model_with_hooks(clean_weights)
