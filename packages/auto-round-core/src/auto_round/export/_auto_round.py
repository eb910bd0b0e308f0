"""The format auto_round: that of Intel's auto-round, which transformers reads with Intel's package installed.

For a layer NAME with the matrix [out, in] there are, in place of NAME.weight:

- `NAME.qweight`, int32 [in * bits / 32, out]: the codes of each column as a stream of bits,
- `NAME.qzeros`, int32 [groups, out * bits / 32]: the zero points of each group of rows alike,
- `NAME.scales`, float16 [groups, out], of either sign.

A weight is `scales * (code - zero)`. `quantization_config` in config.json has what most layers have, and in
`extra_config` what others have, by their names in the model; layers that are left as they are have 16 bits.

There are two kinds of it, which differ in `packing_format`. `auto_round:auto_gptq` stores zero points less 1,
as GPTQ's first format did; most kernels read it, on a CPU for symmetric integers alone. `auto_round` stores
them as they are, and so holds the zero point 0 that asymmetric groups may have.

This is how Intel's version 0.16 reads it. It computes weights in float16, to which it brings float32 models
as a whole; in bfloat16 models its weights are rounded twice, and so differ from those of the format fake in
the last bit here and there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from auto_round.config_manager import AutoRoundConfig, LayerSettings
from auto_round.exceptions import CheckpointError, ConfigurationError
from auto_round.export._files_beside import CONFIG, copy_files, read_config, write_config
from auto_round.export._shards import PlannedTensor, write_shards
from auto_round.export._tensors import FloatTensors, LayerRows, float_tensors, parts_of_layers
from auto_round.low_cpu_mem._checkpoint import CheckpointReader
from auto_round.packing._bitstream import pack, packed_width, unpack
from auto_round.quantization._layers import Layer, find_layers
from auto_round.quantization._quantized import QuantizedWeight
from auto_round.quantization._results import ResultStore
from auto_round.quantization._source import CheckpointModel, FloatModel

QUANT_METHOD = "auto-round"
LESS_ONE, AS_IS = "auto_round:auto_gptq", "auto_round"
"""The two kinds: how zero points are stored."""
BITS = (2, 3, 4, 8)
_BLOCK = 32
_FLOAT = {"bits": 16, "data_type": "float"}
_EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""What readers make of the weights of all experts: for each expert these Linear layers."""


def check_settings(config: AutoRoundConfig, layers: Mapping[str, LayerSettings]) -> None:
    """Refuse what the format has no place for.

    Raises:
        ConfigurationError: The message names the layer.
    """
    if config.quantization.act_bits != 16:
        _refuse(f"quantization.act_bits {config.quantization.act_bits}")
    if config.quantization.scale_dtype != "float16":
        _refuse(f"quantization.scale_dtype {config.quantization.scale_dtype!r}")
    if not layers:
        raise ConfigurationError(
            "no layer is quantised, so there is nothing for the format auto_round; see "
            "quantization.ignore_layers."
        )
    for name, settings in layers.items():
        if settings.weight_dtype != "int":
            _refuse(f"quantization.weight_dtype {settings.weight_dtype!r} ({name})")
        if settings.bits not in BITS:
            _refuse(f"{settings.bits} bits ({name})")


def check_shapes(source: FloatModel, layers: Mapping[str, LayerSettings]) -> None:
    """Refuse layers that Intel's readers cannot have.

    Raises:
        ConfigurationError: The message names the layer.
    """
    for layer in find_layers(source.model):
        shape = tuple(layer.weight.shape)
        if len(shape) == 3:
            _check_experts(layer, layer.name in layers)
        if layer.name not in layers:
            continue
        if shape[-1] % _BLOCK or shape[-2] % _BLOCK:
            _refuse_layer(
                layer,
                f"has a weight of shape {list(shape)}",
                f"layers whose inputs and outputs are multiples of {_BLOCK}",
            )
        if len(shape) == 2 and not layer.transposed and type(layer.module) is not nn.Linear:
            _refuse_layer(layer, f"is a {type(layer.module).__name__}", "plain Linear and Conv1D layers")


def write_auto_round(source: FloatModel, store: ResultStore, folder: Path, max_shard_bytes: int) -> None:
    """Write weights, configuration, and what stands beside them but the tokenizer.

    Raises:
        ConfigurationError: As for `check_shapes`, or a module in memory is none of transformers.
        ExportError: A file cannot be written, or a layer has no place in the checkpoint.
        CheckpointError: The checkpoint cannot be read.
    """
    check_shapes(source, store.layers)
    if isinstance(source, CheckpointModel):
        path = source.weights.reader.path
        copy_files(path, folder)
        config = read_config(path)
    else:
        config = _module_config(source.model, folder)
    tensors = float_tensors(source)
    packed = list(_packed_layers(source, tensors, store.layers))
    settings = {layer.module: layer.settings for layer in packed}
    write_config(folder, {**config, "quantization_config": quantization_config(source, settings)})
    write_shards(folder, _plan(tensors, store, packed), max_shard_bytes)


def quantization_config(source: FloatModel, layers: Mapping[str, LayerSettings]) -> dict[str, Any]:
    """Return what config.json says of the quantised layers, given by their names in the reader's model."""
    blocks = source.block_names[0].rpartition(".")[0]
    most = _described(Counter(layers.values()).most_common(1)[0][0])
    extra: dict[str, dict[str, Any]] = {}
    for name, settings in layers.items():
        own = _described(settings)
        if own != most or not name.startswith(blocks):
            extra[name] = own
    # Readers take every layer whose name begins like the blocks' for quantised.
    for name in (*_linear_names(source.model), *_router_names(source.model)):
        if name.startswith(blocks) and name not in layers:
            extra[name] = _FLOAT
            # They take it for a pattern too, which must not mean layers whose names are longer.
            extra |= {other: _described(own) for other, own in layers.items() if name in other}
    return {
        "quant_method": QUANT_METHOD,
        "packing_format": LESS_ONE if all(own.symmetric for own in layers.values()) else AS_IS,
        **most,
        "block_name_to_quantize": blocks,
        **({"extra_config": extra} if extra else {}),
    }


def read_layer(folder: Path, name: str, module: str | None = None) -> QuantizedWeight:
    """Return a layer of an export in this format; that of symmetric integers has zero points too.

    Args:
        folder: The export.
        name: The layer's name in it.
        module: The layer's name in the model, where that is another.

    Raises:
        CheckpointError: The export is none, or is damaged.
    """
    given = read_config(folder).get("quantization_config")
    about = cast("dict[str, Any]", given) if isinstance(given, dict) else {}
    if about.get("packing_format") not in (LESS_ONE, AS_IS):
        raise CheckpointError(f"{folder / CONFIG} describes no export in the format auto_round.")
    own: dict[str, Any] = {**about, **about.get("extra_config", {}).get(module or name, {})}
    with CheckpointReader(folder) as reader:
        words, zero_words, scales = (reader.read(f"{name}.{end}") for end in ("qweight", "qzeros", "scales"))
    bits, size, symmetric = (own.get(key) for key in ("bits", "group_size", "sym"))
    if bits not in BITS or not isinstance(size, int) or not isinstance(symmetric, bool) or words.ndim != 2:
        raise CheckpointError(f"{folder / CONFIG} says that {name} has bits {bits} and groups of {size}.")
    width, outputs = words.shape[0] * 32 // bits, words.shape[1]
    groups = width // (size if size > 0 else width)
    if scales.shape != (groups, outputs) or zero_words.shape != (groups, packed_width(outputs, bits)):
        raise CheckpointError(
            f"{folder}: {name} has scales of shape {list(scales.shape)} and zero points of shape "
            f"{list(zero_words.shape)}, but {outputs} rows of {width} weights have {groups} groups each."
        )
    zero = unpack(zero_words, bits, outputs).T.contiguous()
    return QuantizedWeight(
        settings=LayerSettings(bits=bits, group_size=size, symmetric=symmetric, weight_dtype="int"),
        codes=unpack(words.T.contiguous(), bits, width),
        scale=scales.T.contiguous(),
        zero=zero + int(own["packing_format"] == LESS_ONE),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _PackedLayer:
    """A layer as the format has it: each expert's are layers of their own."""

    name: str
    """In the export."""
    module: str
    """In the reader's model."""
    replaces: str
    """The float tensor in whose place it is."""
    layer: str
    """The quantised layer of which it is some rows."""
    rows: slice
    """Which."""
    width: int
    """Inputs."""
    settings: LayerSettings
    """Bits and groups."""


def _packed_layers(
    source: FloatModel, tensors: FloatTensors, layers: Mapping[str, LayerSettings]
) -> Iterator[_PackedLayer]:
    for layer, parts in parts_of_layers(source, tensors, layers):
        shape = layer.weight.shape
        common: dict[str, Any] = {
            "layer": layer.name,
            "width": shape[-2 if layer.transposed else -1],
            "settings": layers[layer.name],
        }
        if len(shape) == 2:
            name = parts[0].name.removesuffix(".weight")
            yield _PackedLayer(
                name=name, module=layer.name, replaces=parts[0].name, rows=parts[0].rows, **common
            )
            continue
        matrices = _EXPERTS[layer.attribute]
        step = shape[1] // len(matrices)
        for number in range(shape[0] * len(matrices)):
            rows = slice(number * step, (number + 1) * step)
            part = next(part for part in parts if part.rows.start <= rows.start < part.rows.stop)
            expert, matrix = divmod(number, len(matrices))
            own = f".{expert}.{matrices[matrix]}"
            # The checkpoint has `experts.0.w1.weight` or, for all experts at once, `experts.gate_up_proj`.
            fused = len(part.shape) == 3
            prefix = part.name.removesuffix(".weight").rpartition(".")[0]
            yield _PackedLayer(
                name=prefix + own if fused else f"{prefix}.{matrices[matrix]}",
                module=layer.name.rpartition(".")[0] + own,
                replaces=part.name,
                rows=rows,
                **common,
            )


def _plan(tensors: FloatTensors, store: ResultStore, layers: list[_PackedLayer]) -> list[PlannedTensor]:
    """Return the float tensors in their order, with packed layers in the place of what they replace."""
    less_one = all(layer.settings.symmetric for layer in layers)
    rows = LayerRows(store)
    packed: dict[str, list[PlannedTensor]] = {}
    together: dict[str, list[str]] = {}
    for layer in layers:
        packed.setdefault(layer.replaces, []).extend(_planned(layer, rows, int(less_one)))
        replaced = together.setdefault(layer.layer, [])
        if layer.replaces not in replaced:
            replaced.append(layer.replaces)
    # Parts of one layer follow each other, so that it is read from the store once for each type.
    first = {replaced[0]: replaced for replaced in together.values()}
    plan: list[PlannedTensor] = []
    for name in tensors.names:
        if name in first:
            plan += [tensor for replaced in first[name] for tensor in packed[replaced]]
        elif name not in packed:
            plan.append(tensors.copy(name))
    return plan


def _planned(layer: _PackedLayer, rows: LayerRows, less: int) -> Iterator[PlannedTensor]:
    outputs = layer.rows.stop - layer.rows.start
    bits, size = layer.settings.bits, layer.settings.group_size
    groups = 1 if size == -1 else layer.width // size

    def codes() -> Iterator[Tensor]:
        yield pack(rows.read(layer.layer, layer.rows).codes, bits).T

    def zeros() -> Iterator[Tensor]:
        zero = rows.read(layer.layer, layer.rows).zero
        if zero is None:
            zero = torch.full((outputs, groups), 2 ** (bits - 1), dtype=torch.uint8)
        yield pack((zero - less).T.contiguous(), bits)

    def scales() -> Iterator[Tensor]:
        yield rows.read(layer.layer, layer.rows).scale.T

    words, zero_words = packed_width(layer.width, bits), packed_width(outputs, bits)
    for name, dtype, shape, pieces in (
        ("qweight", torch.int32, (words, outputs), codes),
        ("qzeros", torch.int32, (groups, zero_words), zeros),
        ("scales", torch.float16, (groups, outputs), scales),
    ):
        yield PlannedTensor(name=f"{layer.name}.{name}", dtype=dtype, shape=shape, pieces=pieces)


def _linear_names(model: nn.Module) -> Iterator[str]:
    yield from (layer.name for layer in find_layers(model) if layer.weight.ndim == 2)


def _router_names(model: nn.Module) -> Iterator[str]:
    """Yield the modules beside experts that hold a matrix themselves: readers may make them Linear layers."""
    for layer in find_layers(model):
        if layer.weight.ndim == 3:
            block = layer.name.rpartition(".")[0].rpartition(".")[0]
            for name, module in model.get_submodule(block).named_children():
                weight = getattr(module, "weight", None)
                if isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Linear):
                    yield f"{block}.{name}"


def _described(settings: LayerSettings) -> dict[str, Any]:
    return {
        "bits": settings.bits,
        "group_size": settings.group_size,
        "sym": settings.symmetric,
        "data_type": "int",
    }


def _module_config(model: Any, folder: Path) -> dict[str, Any]:
    """Write what transformers writes beside the weights of a module, and return its configuration."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "save_pretrained") or not hasattr(model, "save_pretrained"):
        raise ConfigurationError(
            f"{type(model).__name__} is no model of transformers, and only these have the configuration that "
            "the format auto_round needs; choose the format fake."
        )
    config.save_pretrained(str(folder))
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.save_pretrained(str(folder))
    dtype = str(model.dtype).removeprefix("torch.")
    return {**read_config(folder), "architectures": [type(model).__name__], "dtype": dtype}


def _check_experts(layer: Layer, quantised: bool) -> None:
    own = {name for name, _ in layer.module.named_parameters()}
    if layer.transposed or own != set(_EXPERTS):
        _refuse_layer(
            layer,
            f"is one of {', '.join(sorted(own))}",
            f"experts of {' and '.join(_EXPERTS)} alone, stored as [experts, out, in]",
        )
    if not quantised:
        raise ConfigurationError(
            f"{layer.name} is left as it is, and the format auto_round holds experts that are quantised; "
            "quantise all of them (with up to 8 bits by quantization.layer_config), or choose fake."
        )


def _refuse(what: str) -> NoReturn:
    raise ConfigurationError(
        f"the format auto_round has no place for {what}; it holds integers of 2, 3, 4 or 8 bits, symmetric "
        "or not, with scales in float16. The format fake holds everything that is quantised."
    )


def _refuse_layer(layer: Layer, what: str, holds: str) -> NoReturn:
    raise ConfigurationError(
        f"{layer.name} {what}, and the format auto_round holds {holds}. Leave it out in "
        "quantization.ignore_layers, or choose the format fake."
    )
