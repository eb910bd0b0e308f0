"""BitNet checkpoints of the Hugging Face layout, as transformers reads and writes them.

Three kinds: packed weights whose scale divides (`linear_class` is `bitlinear`) or multiplies
(`autobitlinear`), and float weights that are rounded whenever they are used (`quantization_mode` is
`online`). The decoder is BitNet's, or a Llama's, which has no norms before the last layers of attention and
of the gated part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from bitcore.packing import hf_bitnet, tiles
from bitlayers import BitLinear
from bitlayers.utils import ternary_layers
from torch import Tensor

from bitmodels.exceptions import BitLabError, CheckpointError
from bitmodels.formats._files import CONFIG, WEIGHTS, read_json, read_tensors, write_json, write_tensors
from bitmodels.formats._loading import fill, is_packed
from bitmodels.transformer import BitTransformerConfig, BitTransformerLM

__all__ = ["load", "save"]

_INDEX = "model.safetensors.index.json"
_KINDS = {"bitnet": "BitNetForCausalLM", "llama": "LlamaForCausalLM"}
_SAME_NAMES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "attention_bias",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
)


def load(
    folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> BitTransformerLM:
    """Read a checkpoint; the model is deployed if its weights are packed.

    Args:
        folder: With `config.json` and `model.safetensors`, or the shards that `model.safetensors.index.json`
            names.
        device: Where the model goes.
        dtype: Of what is not packed; as it is stored if None.

    Raises:
        CheckpointError: A file is missing or damaged, or holds something else than a BitNet model.
    """
    folder = Path(folder)
    path = folder / CONFIG
    values: Any = read_json(path)
    config, linear_class = _config_of(path, values)
    tensors = _tensors_of(folder)
    packed = {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}
    with torch.device("meta"):
        model = BitTransformerLM(config)
    layers = cast("dict[str, BitLinear]", ternary_layers(model))
    if packed:
        if packed != layers.keys():
            odd = ", ".join(sorted(packed ^ layers.keys())[:5])
            raise CheckpointError(f"{folder}: some layers are packed and others are not, such as {odd}.")
        model.deploy()
        for name, layer in layers.items():
            tensors |= _unpacked(folder, name, layer, tensors, linear_class)
    elif (
        cast("dict[str, Any]", values.get("quantization_config") or {}).get("quantization_mode") == "offline"
    ):
        raise CheckpointError(f"{path} says that weights are packed, but no weight has a weight_scale.")
    if model.lm_head is None:
        tensors.pop("lm_head.weight", None)  # The embedding, stored beside it.
    fill(model, tensors, folder)
    model = model.to(device)
    return (model if dtype is None else model.to(dtype)).eval()


def save(
    model: BitTransformerLM, folder: str | Path, *, linear_class: hf_bitnet.LinearClass = "bitlinear"
) -> None:
    """Write a checkpoint that transformers loads: packed if the model is deployed, else floats.

    Args:
        model: That quantises as `BitQuantConfig()` says.
        folder: Made where it is missing.
        linear_class: Which of transformers' layers will compute, and so what the scale means: `bitlinear`
            unpacks weights at each call, `autobitlinear` once, at which releases before
            huggingface/transformers#46808 fail.

    Raises:
        CheckpointError: The layout has no place for what the model is.
        OSError: The files cannot be written.
    """
    folder, config = Path(folder), model.config
    _check_usual(model)
    if config.sub_norm and config.head_size * config.num_attention_heads != config.hidden_size:
        raise CheckpointError("transformers' BitNet has heads that make up hidden_size; this model's do not.")
    deployed = is_packed(model)
    tensors = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.endswith((".qweight", ".qweight_scale"))
    }
    if deployed:
        for name, layer in ternary_layers(model).items():
            scale, codes = layer.ternary_weight()
            if len(codes) % 4:
                raise CheckpointError(f"{name} has {len(codes)} rows; transformers packs a multiple of 4.")
            tensors[f"{name}.weight"] = hf_bitnet.pack(codes)
            tensors[f"{name}.weight_scale"] = hf_bitnet.scale_to_stored(scale[:1], linear_class)
    kind = "bitnet" if config.sub_norm else "llama"
    given = config.to_dict()
    values: dict[str, Any] = {name: given[name] for name in _SAME_NAMES} | {
        "architectures": [_KINDS[kind]],
        "model_type": kind,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_size,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": str(model.model.embed_tokens.weight.dtype).removeprefix("torch."),
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": linear_class if deployed else "autobitlinear",
            "quantization_mode": "offline" if deployed else "online",
            "modules_to_not_convert": ["lm_head"],
        },
    }
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    # One of an earlier checkpoint in shards would be read in place of the weights.
    (folder / _INDEX).unlink(missing_ok=True)
    write_json(folder / CONFIG, values)


def _check_usual(model: BitTransformerLM) -> None:
    """Raise `CheckpointError` unless a model quantises as the formats of others take for granted."""
    config = model.quant_config
    if (
        config.weight_granularity != "per_tensor"
        or not config.quantizes_activations
        or not config.scales_each_token
    ):
        raise CheckpointError(
            "this layout has one scale for a weight and 8-bit activations with one for each token; the model "
            f"has {config}."
        )


def _config_of(path: Path, values: dict[str, Any]) -> tuple[BitTransformerConfig, str]:
    """Return the model's configuration and which way its scales go."""
    kind = values.get("model_type")
    quantization = values.get("quantization_config")
    if kind not in _KINDS or not (quantization is None or isinstance(quantization, dict)):
        raise CheckpointError(f"{path} is of a {kind!r} model; there are {', '.join(_KINDS)}.")
    method = cast("dict[str, Any]", quantization or {})
    if method.get("quant_method", None if kind == "llama" else "bitnet") != "bitnet":
        raise CheckpointError(f"{path} has no quantization_config of the method bitnet.")
    if method.get("use_rms_norm"):
        raise CheckpointError(f"{path} puts a norm before each layer (use_rms_norm), which is not supported.")
    given_rope: Any = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(given_rope, dict):
        raise CheckpointError(f"{path} says of rotations {given_rope!r}, which is no JSON object.")
    rope = cast("dict[str, Any]", given_rope)
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise CheckpointError(f"{path} scales rotations ({rope}), which is not supported.")
    theta = rope.get("rope_theta", values.get("rope_theta"))
    given = {name: values[name] for name in _SAME_NAMES if values.get(name) is not None}
    given |= {"tie_word_embeddings": bool(values.get("tie_word_embeddings", False))}
    try:
        given |= {} if theta is None else {"rope_theta": float(theta)}
        config = BitTransformerConfig.from_dict(given | {"sub_norm": kind == "bitnet"})
    except (BitLabError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return config, str(method.get("linear_class", "bitlinear"))


def _tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of all of a checkpoint's shards."""
    index = folder / _INDEX
    if not index.exists():
        return read_tensors(folder / WEIGHTS)[0]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map.")
    wanted = cast("dict[str, Any]", weight_map)
    tensors: dict[str, Tensor] = {}
    for shard in sorted({str(name) for name in wanted.values()}):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {shard!r}, which is no safetensors file of its folder.")
        tensors |= read_tensors(folder / shard)[0]
    missing = sorted(wanted.keys() - tensors.keys())
    if missing:
        raise CheckpointError(f"{index} names {', '.join(missing[:5])}, which no shard holds.")
    return tensors


def _unpacked(
    folder: Path, name: str, layer: BitLinear, tensors: dict[str, Tensor], linear_class: str
) -> dict[str, Tensor]:
    """Take a layer's packed weight out of a checkpoint's tensors and return it as the layer stores it."""
    try:
        weight, stored = tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.weight_scale")
        rows, columns = layer.out_features, layer.in_features
        scale = hf_bitnet.scale_from_stored(stored, cast("hf_bitnet.LinearClass", linear_class))
        codes = hf_bitnet.unpack(weight, rows, columns)
        packed = tiles.pack(codes)
    except KeyError as error:
        raise CheckpointError(f"{folder}: {error.args[0]} is missing.") from error
    except BitLabError as error:
        raise CheckpointError(f"{folder}: {name}: {error}") from error
    return {f"{name}.qweight": packed, f"{name}.qweight_scale": scale.expand(rows).contiguous()}
