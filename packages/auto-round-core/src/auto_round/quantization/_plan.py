"""How the work is fitted into memory: what a block takes, and what gives way to a limit first."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from av_memory import get_cpu_memory, get_memory_stats
from torch import Tensor, nn

from auto_round.config_manager import LayerSettings, QuantizationConfig
from auto_round.exceptions import ConfigurationError
from auto_round.quantization._capture import Call
from auto_round.quantization._fast_ops import fast_training
from auto_round.quantization._layers import Layer
from auto_round.quantization._scales import STATE_BYTES
from auto_round.quantization._source import FloatModel, block_layers
from auto_round.quantization._tail import Tail

_MB = 2**20
_SLACK_MB = 48
"""For what is not counted: the interpreter's own growth, buffers of files, holes in the heap."""
_ROUNDED_BYTES = 6
_EXPERTS_MB = 64
"""For what torch keeps of products in each number of rows that experts are given, filled up as they are."""
_COMPILER_MB = 350
"""For torch's compiler, once it is imported and has compiled a few functions."""
_SMALL_MB = 256
"""Up to this much kept memory hardly counts, and page faults do; large blocks take their time to multiply."""
_AMPLE = 0.25
"""The share of the machine's free memory that streams may take where no limit is set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockCost:
    """What it takes to work on the most demanding block, in bytes."""

    weights: int
    """Of the block, its masters and what training keeps for each weight."""
    accumulated: int
    """Gradients, where a batch goes through in parts."""
    sample: int
    """Activations of one sample on its way forwards and backwards."""
    streams: int
    """The activations of all samples between two blocks."""
    compiler: int = 0
    """Of torch's compiler, and gradients that compiled code makes all at once."""
    outside: int = 0
    """Of rounding the largest layer outside the blocks, once they are done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Means:
    """With what the walk works."""

    device: torch.device
    dtype: torch.dtype
    micro_batch: int
    """Samples that go through a block at once."""
    spill_folder: Path | None
    """Where activations are kept; None for memory."""
    keeps_heap: bool = False
    """Have the C library keep what is freed within a block for what is allocated next; a step allocates the
    same sizes over and over, and a page that is mapped anew costs more than what is done with it."""
    resident: bool = False
    """Keep all blocks in memory while scales are trained end to end."""
    compiles: bool = False
    """Compile what is run for each step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EndToEndCost:
    """What it takes to train all scales together, in bytes."""

    block: int
    """Of the most demanding block: its weights and codes, and a layer's gradient."""
    blocks: int | None
    """Of all blocks with their codes; None where they must not stay."""
    sample: int
    """Activations of one sample on its way forwards and backwards."""
    streams: int
    """The float model's hidden states, a batch's between all blocks, and what Adam keeps for the scales."""
    tail: int
    """What follows the blocks, and logits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What was decided."""

    micro_batch: int
    """Samples that go through a block at once."""
    spills: bool
    """Activations between blocks are kept on disk."""
    needed_mb: float
    """What this is expected to take, in MB of 2**20 bytes, with what the process holds already."""
    keeps_heap: bool = False
    """The work is so small that memory which is freed may be kept, for speed."""
    resident: bool = False
    """All blocks stay in memory while scales are trained end to end."""


def block_cost(
    block: nn.Module,
    call: Call | None,
    layers: list[tuple[Layer, LayerSettings]],
    config: QuantizationConfig,
    *,
    samples: int,
    sample_shape: tuple[int, ...],
    dtype: torch.dtype,
    trains: bool,
    compiles: bool,
    gives_rows: Callable[[Layer], bool],
) -> BlockCost:
    """Return what it takes to work on a block.

    Args:
        block: May be on the meta device; it is not changed.
        call: How it is called; None where no samples are run.
        layers: What is quantised in it.
        config: Method and batch.
        samples: Samples of calibration; 0 where none are run.
        sample_shape: Of one sample's activations, (tokens, width).
        dtype: In which it is computed.
        trains: Weights are trained.
        compiles: Steps are compiled.
        gives_rows: Says whether a layer's float weight need not be held, as `FloatModel.gives_rows` does.
    """
    own_bytes = sum(parameter.numel() for parameter in block.parameters()) * dtype.itemsize
    sizes = [layer.weight.numel() for layer, _ in layers] or [0]
    # What training keeps of all layers and one gradient, or what rounding one layer takes.
    if trains:
        kept = sum(_trained_bytes(layer, settings, config, gives_rows(layer)) for layer, settings in layers)
        floats = max(
            (layer.weight.numel() for layer, settings in layers if settings.weight_dtype != "int"), default=0
        )
        # Formats of floats are trained by autograd, whose steps take a layer several times over.
        weights = own_bytes + kept + max(sizes) * dtype.itemsize + floats * 32
    else:
        weights = own_bytes + max(sizes) * 16
    if samples and any(layer.weight.ndim == 3 for layer, _ in layers):
        weights += _EXPERTS_MB * _MB
    activations = torch.Size(sample_shape).numel() if samples else 0
    return BlockCost(
        weights=weights,
        accumulated=sum(sizes) * dtype.itemsize if trains else 0,
        sample=0 if call is None else _activation_bytes(block, call, layers, sample_shape, dtype, trains),
        streams=(2 if config.enable_quanted_input else 3) * samples * activations * dtype.itemsize,
        compiler=_COMPILER_MB * _MB + sum(sizes) * dtype.itemsize if compiles else 0,
    )


def outside_bytes(layers: Iterable[tuple[Layer, LayerSettings]]) -> int:
    """Return what rounding the largest of the layers takes: its weight in fp32, and its codes."""
    return max((layer.weight.numel() * _ROUNDED_BYTES for layer, _ in layers), default=0)


def end_to_end_cost(
    source: FloatModel,
    calls: Sequence[Call],
    tail: Tail,
    config: QuantizationConfig,
    *,
    samples: int,
    sample_shape: tuple[int, ...],
    dtype: torch.dtype,
) -> EndToEndCost:
    """Return what it takes to train all scales together.

    Args:
        source: The model; its blocks may be on the meta device.
        calls: How they are called.
        tail: What follows them.
        config: How they are quantised.
        samples: Of calibration.
        sample_shape: Of one sample between two blocks, [tokens, width].
        dtype: In which it is computed.
    """
    sizes: list[int] = []
    demands: dict[object, tuple[int, int]] = {}
    scales = 0
    for block, name, call in zip(source.blocks, source.block_names, calls, strict=True):
        layers = block_layers(block, name, config)
        weights = [layer.weight.numel() for layer, _ in layers]
        scales += sum(_groups(layer, settings) for layer, settings in layers)
        sizes.append(sum(tensor.numel() for tensor in block.parameters()) * dtype.itemsize + sum(weights))
        key = tuple((tuple(layer.weight.shape), settings) for layer, settings in layers)
        if key not in demands:
            # A layer's gradient, or its codes while they are unpacked and multiplied.
            demand = sizes[-1] + 2 * max(weights, default=0) * dtype.itemsize
            demand += _EXPERTS_MB * _MB if any(layer.weight.ndim == 3 for layer, _ in layers) else 0
            demands[key] = demand, _activation_bytes(block, call, layers, sample_shape, dtype, True)
    each = torch.Size(sample_shape).numel() * dtype.itemsize
    batch = min(config.batch_size * config.gradient_accumulate_steps, samples)
    has_quantized_head = any(config.names(name.rpartition(".")[0]) for name in tail.names)
    return EndToEndCost(
        block=max(demand for demand, _ in demands.values()),
        # A module in memory is there already, and a second one would be as large.
        blocks=None if source.folder is None else sum(sizes),
        sample=max(sample for _, sample in demands.values()),
        streams=(samples + (len(sizes) + 2) * batch) * each + STATE_BYTES * scales,
        tail=tail.nbytes(dtype, sample_shape[0], copies=1 + has_quantized_head),
    )


def fits_on_gpu(source: FloatModel, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether all blocks, with a byte for each code, take half of a GPU's free memory at most."""
    if device.type != "cuda":
        return False
    weights = sum(tensor.numel() for block in source.blocks for tensor in block.parameters())
    return weights * (dtype.itemsize + 1) <= torch.cuda.mem_get_info(device)[0] / 2


def make_plan(
    cost: BlockCost, config: QuantizationConfig, max_ram_mb: int | None, together: EndToEndCost | None = None
) -> Plan:
    """Fit the work into the limit: activations go to disk first, then batches go through in smaller parts.

    Args:
        cost: Of the work on blocks.
        config: The size of batches.
        max_ram_mb: The limit.
        together: Of training all scales together, which comes after the blocks. All blocks stay in memory
            where that fits too.

    Raises:
        ConfigurationError: Nothing fits; the message has the limit that would do.
    """
    held_mb = get_cpu_memory()
    batch = config.batch_size

    def plan(micro: int, spills: bool) -> Plan:
        needed_mb = _needed_mb(cost, micro, spills, batch)
        if together is not None:
            needed_mb = max(needed_mb, _together_mb(together, micro, spills))
        return Plan(micro_batch=micro, spills=spills, needed_mb=held_mb + needed_mb)

    def with_all(found: Plan, most_mb: float) -> Plan:
        """Have all blocks stay where that takes no more."""
        if together is None or together.blocks is None:
            return found
        all_mb = _together_mb(together, found.micro_batch, found.spills) + together.blocks / _MB
        if held_mb + all_mb > most_mb:
            return found
        return replace(found, needed_mb=max(found.needed_mb, held_mb + all_mb), resident=True)

    if max_ram_mb is None:
        ample_mb = _AMPLE * get_memory_stats().machine_available_mb
        spills = max(cost.streams, 0 if together is None else together.streams) / _MB > ample_mb
        work_mb = _needed_mb(replace(cost, compiler=0), batch, True, batch)
        found = replace(plan(batch, spills), keeps_heap=work_mb < _SMALL_MB)
        return with_all(found, held_mb + ample_mb)
    choices = [(batch, False), (batch, True)]
    while choices[-1][0] > 1:
        choices.append(((choices[-1][0] + 1) // 2, True))
    plans = [plan(micro, spills) for micro, spills in choices]
    for found in plans:
        if found.needed_mb <= max_ram_mb:
            return with_all(found, max_ram_mb)
    smallest = plans[-1].needed_mb
    what, remedy = "the largest block takes", ""
    if held_mb + _needed_mb(cost, 1, True, batch) < smallest:
        what = "training all scales together takes"
        remedy = ", quantization.end_to_end_iters 0"
    if cost.compiler:
        remedy += ", quantization.compile False"
    raise ConfigurationError(
        f"memory.max_ram_mb is {max_ram_mb}, but {what} {smallest:.0f} MB even with "
        f"activations on disk and one sample at a time ({held_mb:.0f} MB are in use already). Set it to at "
        f"least {int(smallest) + 1}, take a shorter quantization.seqlen{remedy}, or a method that trains "
        "less (quantization.quality 'signround', 'optimized_rtn' or 'rtn')."
    )


def spill_folder(workspace: Path, plan: Plan) -> Path | None:
    """Return where activations are kept; None for memory."""
    return workspace if plan.spills else None


def _needed_mb(cost: BlockCost, micro_batch: int, spills: bool, batch: int) -> float:
    accumulated = cost.accumulated if micro_batch < batch else 0
    streams = 0 if spills else cost.streams
    block = cost.weights + accumulated + cost.sample * micro_batch
    return (max(block, cost.outside) + cost.compiler + streams) / _MB + _SLACK_MB


def _together_mb(cost: EndToEndCost, micro_batch: int, spills: bool) -> float:
    streams = 0 if spills else cost.streams
    # What follows the blocks stays; its logits and a block's activations are not there at once, but nearly.
    return (cost.block + cost.tail + cost.sample * micro_batch + streams) / _MB + _SLACK_MB


def _trained_bytes(layer: Layer, settings: LayerSettings, config: QuantizationConfig, in_place: bool) -> int:
    """Return what the tuner of a layer keeps: the weight where it must, and what is trained."""
    each = 9
    if settings.weight_dtype == "int":
        each = 13 if config.quality == "best" else 5 if in_place else 9
    return each * layer.weight.numel() + 32 * _groups(layer, settings)


def _groups(layer: Layer, settings: LayerSettings) -> int:
    return layer.weight.numel() // (layer.width if settings.group_size == -1 else settings.group_size)


def _activation_bytes(
    block: nn.Module,
    call: Call,
    layers: list[tuple[Layer, LayerSettings]],
    sample_shape: tuple[int, ...],
    dtype: torch.dtype,
    trains: bool,
) -> int:
    """Return what one sample's activations take, by running the block on the meta device if it can be."""
    meta = torch.device("meta")
    twin = copy.deepcopy(block).to(meta, dtype).requires_grad_(False)
    names = {layer.parameter_name for layer, _ in layers}
    # The block's own name is the part of its layers' names that its parameters lack.
    for name, parameter in twin.named_parameters():
        if any(full.endswith(name) for full in names):
            parameter.requires_grad_(trains)
    held: dict[int, Tensor] = {}
    weights = {parameter.untyped_storage()._cdata for parameter in twin.parameters()}  # pyright: ignore

    def pack(tensor: Tensor) -> Tensor:
        storage: int = tensor.untyped_storage()._cdata  # pyright: ignore
        if storage not in weights:
            held[storage] = tensor
        return tensor

    hidden = torch.empty((1, *sample_shape), dtype=dtype, device=meta)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), fast_training(twin):
            output = call.to(meta, dtype)(twin, hidden)
        del output
        sizes = [tensor.untyped_storage().nbytes() for tensor in held.values()]
    except (RuntimeError, NotImplementedError, ValueError):
        # What depends on values, such as which expert gets which token, cannot be run without them.
        tokens = sample_shape[0]
        sizes = [tokens * sum(layer.weight.shape[-2:]) * 2 * dtype.itemsize for layer, _ in layers]
    largest = max(sizes, default=0)
    wide = torch.Size(sample_shape).numel() * 4
    # Backwards a few gradients of the largest activations are there as well, and output and target.
    return (sum(sizes) if trains else 0) + 3 * max(largest, wide) + 2 * hidden.nbytes
