"""GGUF files of ternary language models, for llama.cpp and bitnet.cpp."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from bitcore.packing import gguf_i2_s, gguf_ternary
from bitlayers.utils import ternary_layers
from torch import Tensor

from bitmodels.exceptions import CheckpointError
from bitmodels.formats._files import read_json, write_safely

if TYPE_CHECKING:
    from bitmodels.transformer import BitTransformerLM

__all__ = ["GGUFType", "export"]

GGUFType = Literal["TQ2_0", "TQ1_0", "I2_S"]
# What bitnet.cpp has added to ggml's types.
_I2_S, _I2_S_FILE = 36, 40
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
    "mlp.down_proj": "ffn_down",
}


def export(
    model: BitTransformerLM,
    path: str | Path,
    *,
    kind: GGUFType = "TQ2_0",
    tokenizer: str | Path | None = None,
    name: str | None = None,
) -> None:
    """Write a model as one GGUF file.

    TQ2_0 (2.06 bits a weight) and TQ1_0 (1.69) are llama.cpp's, with a scale of 16 bits for 256 weights; I2_S
    (2 bits) is bitnet.cpp's alone. The embedding is stored as fp16 and norms as fp32. llama.cpp knows the
    architecture `bitnet`, whose head is the embedding and whose norms are all there.

    Args:
        model: Deployed or not, with `tie_word_embeddings` and `sub_norm`, and without biases.
        path: The file, written whole or not at all.
        kind: Of the ternary weights.
        tokenizer: A `tokenizer.json` of byte-level BPE, split as GPT-2's. Without one the file has no
            vocabulary, and programs take and give ids alone.
        name: `general.name`.

    Raises:
        CheckpointError: The format has no place for what the model is, or the tokenizer is of another kind.
        ImportError: The package gguf is not installed.
        QuantizationError: A weight's rows are no multiple of 256, or of 128 for I2_S.
        OSError: The file cannot be written.
    """
    if kind not in get_args(GGUFType):
        raise CheckpointError(f"kind is {kind!r}; it must be one of {', '.join(get_args(GGUFType))}.")
    config = model.config
    if not config.tie_word_embeddings or not config.sub_norm or config.attention_bias:
        raise CheckpointError(
            "the bitnet architecture of GGUF has tie_word_embeddings and sub_norm and no attention_bias; "
            "this model differs."
        )
    if not model.quant_config.quantizes_activations:
        raise CheckpointError(
            "programs that read GGUF round activations, which this model was not trained for."
        )
    try:
        library: Any = importlib.import_module("gguf")
    except ImportError as error:
        raise ImportError(
            'GGUF files are written by the package gguf; install it with `pip install "gguf>=0.17"`.'
        ) from error
    # Relu squared came to the architecture's first name late, and bitnet.cpp reads the second only.
    architecture = "bitnet-b1.58" if kind == "I2_S" else "bitnet"
    tensors = _tensors(model, kind)

    def write(file: Path) -> None:
        writer = library.GGUFWriter(file, architecture)
        writer.add_name(name or "BitTransformerLM")
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_rope_dimension_count(config.head_size)
        writer.add_vocab_size(config.vocab_size)
        writer.add_string(f"{architecture}.hidden_activation", config.hidden_act)
        file_types = library.LlamaFileType
        writer.add_file_type(_I2_S_FILE if kind == "I2_S" else int(getattr(file_types, f"MOSTLY_{kind}")))
        _add_vocabulary(library, writer, model, tokenizer)
        for tensor_name, (data, shape, raw) in tensors.items():
            kinds = library.GGMLQuantizationType
            raw_dtype = None if raw is None else _I2_S if raw == "I2_S" else kinds[raw]
            writer.add_tensor(tensor_name, data.numpy(), raw_shape=shape, raw_dtype=raw_dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_safely(Path(path), write)


def _tensors(
    model: BitTransformerLM, kind: GGUFType
) -> dict[str, tuple[Tensor, list[int] | None, str | None]]:
    """Return by GGUF's names what is stored, its shape where bytes do not tell it, and the type of bytes."""
    found: dict[str, tuple[Tensor, list[int] | None, str | None]] = {}
    layers = ternary_layers(model)
    for name, layer in layers.items():
        scale, codes = layer.ternary_weight()
        if kind == "I2_S":
            if not bool((scale == scale[0]).all()):
                raise CheckpointError(f"{name} has a scale for each row; I2_S has one for a weight.")
            # As int8, which the library does not take for blocks of a type that it knows.
            data, shape = gguf_i2_s.pack(codes, scale[:1]).view(torch.int8), list(codes.shape)
        else:
            data, shape = gguf_ternary.pack(codes, scale, kind), None
        found[f"{_gguf_name(name)}.weight"] = data.cpu(), shape, kind
    for name, tensor in model.state_dict().items():
        own, _, leaf = name.rpartition(".")
        if own not in layers:
            wide = tensor.detach().cpu()
            wide = wide.half() if wide.ndim == 2 else wide.float()
            if not bool(wide.isfinite().all()):
                raise CheckpointError(f"{name} holds numbers that are not finite in {wide.dtype}.")
            found[f"{_gguf_name(own)}.{leaf}"] = wide, None, None
    return found


def _gguf_name(name: str) -> str:
    prefix = "model.layers."
    if not name.startswith(prefix):
        return _NAMES[name]
    block, _, part = name.removeprefix(prefix).partition(".")
    return f"blk.{block}.{_NAMES[part]}"


def _add_vocabulary(library: Any, writer: Any, model: BitTransformerLM, tokenizer: str | Path | None) -> None:
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    path, config = Path(tokenizer), model.config
    values = read_json(path)
    known, before = (cast("dict[str, Any]", values.get(part) or {}) for part in ("model", "pre_tokenizer"))
    if known.get("type") != "BPE" or before.get("type") != "ByteLevel" or not before.get("use_regex", True):
        raise CheckpointError(
            f"{path} is not a byte-level BPE that splits text as GPT-2's does, the one kind that is exported."
        )
    added = {int(token["id"]): token for token in values.get("added_tokens") or ()}
    by_id = {int(number): str(token) for token, number in known["vocab"].items()}
    by_id |= {number: str(token["content"]) for number, token in added.items()}
    if by_id and max(by_id) >= config.vocab_size:
        raise CheckpointError(f"{path} has ids up to {max(by_id)}; the model has {config.vocab_size}.")
    types = library.TokenType
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(config.vocab_size)]
    kinds = [
        types.UNUSED
        if number not in by_id
        else types.NORMAL
        if number not in added
        else types.CONTROL
        if added[number].get("special")
        else types.USER_DEFINED
        for number in range(config.vocab_size)
    ]
    pairs: list[str | list[str]] = known["merges"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    ends = config.eos_token_id
    if ends is not None:
        writer.add_eos_token_id(ends if isinstance(ends, int) else ends[0])
