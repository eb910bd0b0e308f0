"""Configuration of the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from bitmodels.config import ModelConfig, check_positive
from bitmodels.exceptions import QuantizationError

__all__ = ["BitTransformerConfig", "HiddenAct"]

HiddenAct = Literal["relu2", "silu"]


@dataclass(frozen=True, kw_only=True)
class BitTransformerConfig(ModelConfig):
    """Configuration of a `BitTransformerLM`, its fields named as in Hugging Face's configurations.

    Raises:
        QuantizationError: A value is impossible.
    """

    vocab_size: int
    """Tokens."""
    hidden_size: int = 512
    """Size of the residual stream."""
    intermediate_size: int = 1408
    """Size of the gated layer."""
    num_hidden_layers: int = 8
    """Blocks."""
    num_attention_heads: int = 8
    """Heads of queries."""
    num_key_value_heads: int | None = None
    """Heads of keys and values; as many as of queries if None."""
    head_dim: int | None = None
    """Size of a head; `hidden_size / num_attention_heads` if None."""
    max_position_embeddings: int = 2048
    """Most tokens of a sequence."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding's wavelengths."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square in norms."""
    hidden_act: HiddenAct = "relu2"
    """The gate's activation: the square of the rectifier, as in BitNet 2B-4T, or SiLU, which makes SwiGLU."""
    attention_bias: bool = False
    """Whether the layers of attention have biases."""
    sub_norm: bool = True
    """Norms before the last layer of attention and of the gated part, beside those of a Llama."""
    tie_word_embeddings: bool = True
    """One matrix for the embedding and the head."""
    initializer_range: float = 0.02
    """Standard deviation of weights at the beginning."""
    bos_token_id: int | None = None
    """The token that begins a text."""
    eos_token_id: int | tuple[int, ...] | None = None
    """The token, or tokens, that end a text."""

    def __post_init__(self) -> None:
        check_positive(
            self,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        )
        for name in ("num_key_value_heads", "head_dim"):
            if getattr(self, name) is not None:
                check_positive(self, name)
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise QuantizationError(
                f"hidden_size is {self.hidden_size}, which {self.num_attention_heads} heads do not divide; "
                "give head_dim."
            )
        if self.head_size % 2:
            raise QuantizationError(f"a head has {self.head_size} dimensions; rotation needs pairs.")
        if self.num_attention_heads % self.key_value_heads:
            raise QuantizationError(
                f"num_key_value_heads is {self.num_key_value_heads}; it must divide the "
                f"{self.num_attention_heads} heads of queries."
            )
        if self.hidden_act not in get_args(HiddenAct):
            raise QuantizationError(
                f"hidden_act is {self.hidden_act!r}; it must be one of {', '.join(get_args(HiddenAct))}."
            )
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            if not getattr(self, name) > 0:
                raise QuantizationError(f"{name} is {getattr(self, name)!r}; it must be above zero.")

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Size of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads
