"""The float model: its blocks come from a checkpoint one at a time, or from a module in memory."""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from av_memory import get_cpu_memory, get_memory_stats
from torch import Tensor, nn

from auto_round.config_manager import LayerSettings, QuantizationConfig
from auto_round.exceptions import ConfigurationError, QuantizationError
from auto_round.low_cpu_mem._checkpoint import CheckpointReader
from auto_round.low_cpu_mem._empty import empty_model, model_folder
from auto_round.low_cpu_mem._hooks import HookManager
from auto_round.low_cpu_mem._weights import ModelWeights
from auto_round.quantization._compute import all_finite
from auto_round.quantization._layers import Layer, find_blocks, find_layers
from auto_round.quantization._pieces import WeightRows
from auto_round.quantization._quantized import QuantizedWeight


class FloatModel(ABC):
    """A model whose blocks are worked on one after another.

    Attributes:
        model: The module; of a checkpoint with weights that are not there.
        block_names: Full names of the repeated blocks.
        blocks: The blocks.
        folder: Where the checkpoint is; None for a module in memory.
    """

    folder: Path | None = None

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        name, self.blocks = find_blocks(model)
        self.block_names = [f"{name}.{index}" for index in range(len(self.blocks))]

    @property
    def kind(self) -> str:
        """The class of the model."""
        return type(self.model).__name__

    @property
    def vocab_size(self) -> int | None:
        """How many tokens the model knows, if it says."""
        embeddings = getattr(self.model, "get_input_embeddings", lambda: None)()
        return getattr(embeddings, "num_embeddings", None)

    @property
    def max_tokens(self) -> int | None:
        """The longest sequence that the model was made for, if it says."""
        config = getattr(self.model, "config", None)
        return getattr(config, "max_position_embeddings", None)

    @contextmanager
    def callable_head(self) -> Generator[nn.Module]:
        """Give the model with what comes before its blocks ready to be called, on the CPU."""
        yield self.model

    @abstractmethod
    def load(self, index: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Return a block to be changed at will, its float weights in `dtype` on the device."""

    @abstractmethod
    def read(self, layer: Layer, device: torch.device) -> Tensor:
        """Return the float weight of a layer as a matrix [rows, in], new memory in fp32."""

    @abstractmethod
    def gives_rows(self, layer: Layer) -> bool:
        """Return whether `rows` gives a layer's weight on the CPU without holding it."""

    def rows(self, layer: Layer, device: torch.device) -> WeightRows:
        """Return what gives the rows of a layer's float weight, fp32, as long as its block is worked on."""
        if device.type == "cpu" and self.gives_rows(layer):
            return self._rows(layer)
        return self.read(layer, device)

    @abstractmethod
    def _rows(self, layer: Layer) -> WeightRows: ...

    @abstractmethod
    def finish(self, index: int, weights: Mapping[str, QuantizedWeight]) -> None:
        """Let go what `load` returned; a module in memory takes over the quantised weights."""

    @abstractmethod
    def value(self, name: str) -> Tensor:
        """Return a parameter by its full name, on any device; not to be changed."""

    def check_finite(self, config: QuantizationConfig) -> None:
        """Look at all weights of the blocks, and of the layers outside them that are quantised.

        Takes memory for one of them.

        Raises:
            QuantizationError: One is NaN or infinite; the message names the parameter.
        """
        names = [
            f"{prefix}.{name}"
            for block, prefix in zip(self.blocks, self.block_names, strict=True)
            for name, _ in block.named_parameters()
        ]
        for name in names + [layer.parameter_name for layer, _ in self.outside(config)]:
            value = self.value(name).detach()
            if not all_finite(value):
                raise QuantizationError(
                    f"{name}: {int((~value.isfinite()).sum())} of {value.numel()} weights are NaN or "
                    "infinite; the checkpoint is damaged or its training diverged. Nothing can be quantised "
                    "from it."
                )

    @contextmanager
    def whole_model(self, max_ram_mb: int | None) -> Generator[nn.Module]:  # noqa: ARG002
        """Give the model ready to be called as a whole, on the CPU."""
        with self.callable_head() as model:
            yield model

    @abstractmethod
    def take_over(self, weights: Mapping[str, QuantizedWeight]) -> None:
        """Put quantised weights into a module in memory; does nothing to a checkpoint."""

    def close(self) -> None:  # noqa: B027 - a module in memory has nothing to close
        """Close files."""

    def all_layers(self) -> Iterator[Layer]:
        """Yield all layers, inside and outside the blocks."""
        yield from find_layers(self.model)

    def outside(self, config: QuantizationConfig) -> Iterator[tuple[Layer, LayerSettings]]:
        """Yield the layers outside the blocks that `layer_config` names, and how each is quantised."""
        inside = tuple(f"{name}." for name in self.block_names)
        for layer in find_layers(self.model):
            settings = config.for_layer(layer.name)
            if settings is None or layer.name.startswith(inside) or not config.names(layer.name):
                continue
            every = self.model.named_parameters(remove_duplicate=False)
            if sum(weight is layer.weight for _, weight in every) > 1:
                raise QuantizationError(
                    f"{layer.name} shares its weight with the embedding, which is not quantised; take it "
                    "out of quantization.layer_config, or untie the two in the checkpoint."
                )
            yield layer, settings


class CheckpointModel(FloatModel):
    """A checkpoint on disk; nothing of it is in memory but the block that is being worked on.

    Args:
        path: Folder, or name of a model in the local cache of the Hugging Face hub.
        model_class: As for `empty_model`.
        trust_remote_code: As for `empty_model`.

    Raises:
        CheckpointError: It is incomplete or damaged.
        QuantizationError: The model has no repeated blocks.
    """

    def __init__(
        self, path: str | PathLike[str], model_class: Any = None, *, trust_remote_code: bool = False
    ) -> None:
        self.folder = model_folder(path)
        self._reader = CheckpointReader(self.folder)
        try:
            super().__init__(empty_model(path, model_class, trust_remote_code=trust_remote_code))
            self.weights = ModelWeights(self.model, self._reader)
        except BaseException:
            self._reader.close()
            raise

    @contextmanager
    def callable_head(self) -> Generator[nn.Module]:
        """Give the model with hooks that read what comes before its blocks as it is called."""
        manager = HookManager(model=self.model, path=str(self.folder), device="cpu", clean_weights=True)
        try:
            manager.register_hooks()
            yield self.model
        finally:
            manager.remove_hooks()

    @contextmanager
    def whole_model(self, max_ram_mb: int | None) -> Generator[nn.Module]:
        """Give the model loaded where it takes half of the free memory at most, and else with hooks."""
        size_mb = sum(self.weights.info(name).bytes for name in self.weights.names) / 2**20
        free_mb = get_memory_stats().machine_available_mb
        if max_ram_mb is not None:
            free_mb = min(free_mb, max_ram_mb - get_cpu_memory())
        if size_mb > free_mb / 2:
            with self.callable_head() as model:
                yield model
            return
        try:
            self.weights.load_module(self.model, "")
            yield self.model
        finally:
            self.weights.unload_module(self.model)

    def load(self, index: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Return a block with its weights read into it."""
        self.weights.load_module(self.blocks[index], self.block_names[index], dtype=dtype, device=device)
        return self.blocks[index].to(device)

    def read(self, layer: Layer, device: torch.device) -> Tensor:
        """Return the float weight of a layer as a matrix [rows, in], new memory in fp32."""
        stored = self.weights.read(layer.parameter_name, dtype=torch.float32)
        return layer.matrix(stored).contiguous().to(device)

    def value(self, name: str) -> Tensor:
        """Return a parameter by its full name, read from the checkpoint."""
        return self.weights.read(name)

    def gives_rows(self, layer: Layer) -> bool:
        """Return whether a layer's rows are stored as they are."""
        plain = layer.weight.ndim == 2 and not layer.transposed
        return plain and self.weights.reads_rows(layer.parameter_name)

    def _rows(self, layer: Layer) -> WeightRows:
        read = functools.partial(self.weights.read_rows, layer.parameter_name, dtype=torch.float32)
        return _Rows(layer.weight.shape, read)

    def finish(self, index: int, weights: Mapping[str, QuantizedWeight]) -> None:  # noqa: ARG002
        """Let the block's weights go."""
        self.weights.unload_module(self.blocks[index])

    def take_over(self, weights: Mapping[str, QuantizedWeight]) -> None:
        """Do nothing: the checkpoint stays as it is."""

    def close(self) -> None:
        """Close the checkpoint."""
        self._reader.close()


class _Rows:
    """Rows of a float weight that stays where it is."""

    def __init__(self, shape: tuple[int, ...], read: Callable[[slice], Tensor]) -> None:
        self.shape, self._read = shape, read

    def __getitem__(self, rows: slice, /) -> Tensor:
        return self._read(rows)


class ModuleModel(FloatModel):
    """A module in memory, whose layers take over the quantised weights block by block.

    Args:
        model: The module; its own device and type do not matter.
    """

    def __init__(self, model: nn.Module) -> None:
        meta = next((name for name, tensor in model.named_parameters() if tensor.device.type == "meta"), None)
        if meta is not None:
            raise ConfigurationError(
                f"{meta} has no values (it is on the meta device); give the path of the checkpoint instead."
            )
        super().__init__(model)

    @contextmanager
    def callable_head(self) -> Generator[nn.Module]:
        """Give the model in evaluation mode."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            yield self.model
        finally:
            for module in training:
                module.training = True

    def load(self, index: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Return a copy of a block."""
        return copy.deepcopy(self.blocks[index]).eval().to(device, dtype)

    def read(self, layer: Layer, device: torch.device) -> Tensor:
        """Return the float weight of a layer as a matrix [rows, in], new memory in fp32."""
        stored = self.value(layer.parameter_name).detach()
        return layer.matrix(stored).to(device, torch.float32, copy=True).contiguous()

    def value(self, name: str) -> Tensor:
        """Return a parameter by its full name, the module's own."""
        return self.model.get_parameter(name)

    def gives_rows(self, layer: Layer) -> bool:
        """Return whether a layer's rows are in the module as they are; it has its floats until `finish`."""
        return layer.weight.ndim == 2

    def _rows(self, layer: Layer) -> WeightRows:
        matrix = layer.matrix(self.value(layer.parameter_name).detach())
        return _Rows(matrix.shape, lambda rows: matrix[rows].to("cpu", torch.float32).contiguous())

    def finish(self, index: int, weights: Mapping[str, QuantizedWeight]) -> None:  # noqa: ARG002
        """Put the quantised weights into the module."""
        self.take_over(weights)

    def take_over(self, weights: Mapping[str, QuantizedWeight]) -> None:
        """Put the quantised weights into the module."""
        with torch.no_grad():
            for layer in find_layers(self.model):
                if layer.name in weights:
                    with layer.open(layer.weight.data) as matrix:
                        matrix.copy_(weights[layer.name].dequantize(matrix.dtype))


def open_model(
    model: str | PathLike[str] | nn.Module, model_class: Any = None, *, trust_remote_code: bool = False
) -> FloatModel:
    """Return the float model of a path or of a module in memory.

    Raises:
        ConfigurationError: It is neither.
        CheckpointError, QuantizationError: As for the two kinds.
    """
    if isinstance(model, nn.Module):
        return ModuleModel(model)
    if isinstance(model, str | PathLike):
        return CheckpointModel(model, model_class, trust_remote_code=trust_remote_code)
    raise ConfigurationError(f"the model is a {type(model).__name__}; give a path or a torch module.")


def block_layers(
    block: nn.Module, name: str, config: QuantizationConfig
) -> list[tuple[Layer, LayerSettings]]:
    """Return the layers of a block that are quantised, and how.

    Raises:
        QuantizationError: A group size does not divide a layer's rows; the message names the layer.
    """
    found: list[tuple[Layer, LayerSettings]] = []
    for layer in find_layers(block, name):
        settings = config.for_layer(layer.name)
        if settings is None:
            continue
        if settings.group_size != -1 and layer.width % settings.group_size:
            raise QuantizationError(
                f"{layer.name} has rows of {layer.width} weights, which groups of {settings.group_size} do "
                "not divide. Choose another quantization.group_size, give the layer one of its own in "
                "quantization.layer_config, or leave it out in quantization.ignore_layers."
            )
        found.append((layer, settings))
    return found
