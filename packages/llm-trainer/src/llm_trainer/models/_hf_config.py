"""Our configuration as a `config.json` of Llama or GPT-2, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from llm_trainer._files import shown
from llm_trainer.config import ModelConfig
from llm_trainer.exceptions import ConfigurationError, FormatError, ModelConfigurationError

_BOTH = {"pre_norm": True, "qk_norm": False, "logit_softcap": None}
_NEEDED: dict[str, dict[str, object]] = {
    "llama": {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", **_BOTH},
    "gpt2": {"positions": "learned", "norm": "layernorm", "activation": "gelu", "bias": True, **_BOTH},
}
# What does not change the logits, or is the tokenizer's or generation's business.
_WITHOUT_EFFECT = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "is_llama_config",
    "label2id",
    "model_type",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "use_cache",
}


def architecture_of(config: ModelConfig) -> str:
    """Return `llama` or `gpt2`, whichever computes what `config` describes.

    Raises:
        ModelConfigurationError: Neither does; the fields that stand in the way are named.
    """
    obstacles = {
        architecture: [
            f"{name}={value!r} (it is {getattr(config, name)!r})"
            for name, value in needed.items()
            if getattr(config, name) != value
        ]
        for architecture, needed in _NEEDED.items()
    }
    if config.kv_heads != config.n_heads:
        obstacles["gpt2"].append(f"n_kv_heads=None (it is {config.n_kv_heads})")
    for architecture, found in obstacles.items():
        if not found:
            return architecture
    raise ModelConfigurationError(
        f"No architecture that can be exported computes this model. Llama needs "
        f"{', '.join(obstacles['llama'])}; GPT-2 needs {', '.join(obstacles['gpt2'])}. Models of the presets "
        f'"llama-small" or "gpt2-small" (or of their other sizes) can be exported.'
    )


def hf_config(config: ModelConfig, dtype: str, token_ids: Mapping[str, int | None]) -> dict[str, Any]:
    """Return what `config.json` is to hold: both spellings where those of transformers 4 and 5 differ."""
    architecture = architecture_of(config)
    common: dict[str, Any] = {
        "model_type": architecture,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        **token_ids,
    }
    if architecture == "llama":
        return common | {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": config.d_model,
            "intermediate_size": config.d_ff,
            "num_hidden_layers": config.n_layers,
            "num_attention_heads": config.n_heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.d_head,
            "hidden_act": "silu",
            "max_position_embeddings": config.max_seq_len,
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            "attention_bias": config.bias,
            "mlp_bias": config.bias,
            "attention_dropout": config.attention_dropout,
        }
    return common | {
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": config.d_model,
        "n_inner": config.d_ff,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_positions": config.max_seq_len,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout,
    }


class _Fields:
    """The fields of a `config.json` that nobody has asked for yet."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self.path = path
        self._left = {name: value for name, value in content.items() if value is not None}

    def required(self, name: str) -> Any:
        if name not in self._left:
            raise FormatError(f"{self.path} has no field {name!r}, so the model's shape is not known.")
        return self._left.pop(name)

    def optional(self, name: str, default: Any) -> Any:
        return self._left.pop(name, default)

    def only(self, name: str, *allowed: Any) -> None:
        """Refuse a field that has none of the values allowed, of which the first is the default."""
        value = self._left.pop(name, allowed[0])
        if value not in allowed:
            self.refuse(name, value, f"llm-trainer has only {' or '.join(map(repr, allowed))}")

    def refuse(self, name: str, value: object, why: str) -> None:
        raise ModelConfigurationError(f"{self.path}: {name} is {shown(value)}, but {why}.")

    def finish(self) -> None:
        """Refuse fields that nobody knows, unless they are off."""
        for name, value in self._left.items():
            if name not in _WITHOUT_EFFECT and value is not False:
                self.refuse(
                    shown(name),
                    value,
                    "llm-trainer does not know this field and will not ignore it; if it changes nothing in "
                    "the model, remove it from the file",
                )


def read_hf_config(path: Path, content: Mapping[str, Any]) -> tuple[str, ModelConfig]:
    """Return the architecture and our configuration for the content of a `config.json`.

    Raises:
        FormatError: A field is missing or of a wrong type.
        ModelConfigurationError: It is of another architecture, or uses what llm-trainer lacks; the field and
            its value are named.
    """
    fields = _Fields(path, content)
    architecture = content.get("model_type")
    if architecture == "llm_trainer":
        raise FormatError(f"{path} describes a model of llm-trainer: read it with from_pretrained.")
    readers = {"llama": _read_llama, "gpt2": _read_gpt2}
    if not isinstance(architecture, str) or architecture not in readers:
        raise ModelConfigurationError(
            f"{path}: model_type is {shown(architecture)}; from_hf reads 'llama' and 'gpt2'."
        )
    head_width = fields.optional("head_dim", None)
    values = readers[architecture](fields) | {"vocab_size": fields.required("vocab_size")}
    for name in ("is_decoder", "is_encoder_decoder", "add_cross_attention"):
        fields.only(name, False)
    fields.finish()
    try:
        config = ModelConfig.from_dict(_NEEDED[architecture] | values)
    except ConfigurationError as error:
        raise FormatError(f"{path} does not describe a model: {error}") from error
    if head_width not in (None, config.d_head):
        fields.refuse("head_dim", head_width, f"llm-trainer has only width // heads, here {config.d_head}")
    return architecture, config


def _read_llama(fields: _Fields) -> dict[str, Any]:
    heads = fields.required("num_attention_heads")
    bias = fields.optional("attention_bias", False)
    if fields.optional("mlp_bias", False) != bias:
        fields.refuse(
            "attention_bias", bias, "mlp_bias is not, and llm-trainer has biases in both or neither"
        )
    fields.only("hidden_act", "silu")
    fields.only("pretraining_tp", 1)
    kv_heads = fields.optional("num_key_value_heads", None)
    return {
        "d_model": fields.required("hidden_size"),
        "n_heads": heads,
        "n_kv_heads": None if kv_heads == heads else kv_heads,
        "n_layers": fields.required("num_hidden_layers"),
        "d_ff": fields.required("intermediate_size"),
        "max_seq_len": fields.required("max_position_embeddings"),
        "norm_eps": fields.optional("rms_norm_eps", 1e-6),
        "rope_theta": _rope_theta(fields),
        "bias": bias,
        "tie_embeddings": fields.optional("tie_word_embeddings", False),
        "dropout": 0.0,
        "attention_dropout": fields.optional("attention_dropout", 0.0),
    }


def _rope_theta(fields: _Fields) -> Any:
    """Read transformers 4's `rope_theta` and `rope_scaling`, and transformers 5's `rope_parameters`."""
    theta = fields.optional("rope_theta", None)
    for name in ("rope_parameters", "rope_scaling"):
        rope = fields.optional(name, {})
        if not isinstance(rope, dict):
            raise FormatError(f"{fields.path}: {name} is {shown(rope)}; it must be an object.")
        inner = _Fields(fields.path, cast("dict[str, Any]", rope))
        for key in ("rope_type", "type"):
            inner.only(key, "default")
        inner.only("partial_rotary_factor", 1.0)
        found = inner.optional("rope_theta", theta)
        if theta is not None and found != theta:
            fields.refuse("rope_theta", theta, f"{name} says {shown(found)}")
        theta = found
        inner.finish()
    fields.only("partial_rotary_factor", 1.0)
    return 10000.0 if theta is None else theta


def _read_gpt2(fields: _Fields) -> dict[str, Any]:
    width, positions = fields.required("n_embd"), fields.required("n_positions")
    dropout = fields.optional("resid_pdrop", 0.1)
    embedding_dropout = fields.optional("embd_pdrop", 0.1)
    if embedding_dropout != dropout:
        fields.refuse("embd_pdrop", embedding_dropout, f"resid_pdrop is {shown(dropout)}; they must be equal")
    fields.only("activation_function", "gelu_new", "gelu_pytorch_tanh")
    fields.only("scale_attn_weights", True)
    fields.only("scale_attn_by_inverse_layer_idx", False)
    fields.only("reorder_and_upcast_attn", False)
    # An older name for the same number.
    fields.only("n_ctx", positions)
    return {
        "d_model": width,
        "n_heads": fields.required("n_head"),
        "n_layers": fields.required("n_layer"),
        "d_ff": fields.optional("n_inner", 4 * width if isinstance(width, int) else width),
        "max_seq_len": positions,
        "norm_eps": fields.optional("layer_norm_epsilon", 1e-5),
        "tie_embeddings": fields.optional("tie_word_embeddings", True),
        "dropout": dropout,
        "attention_dropout": fields.optional("attn_pdrop", 0.1),
    }
