"""The architecture of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from llm_trainer.config._base import Config
from llm_trainer.config._presets import NAMES, preset_fields
from llm_trainer.exceptions import ConfigurationError, ModelConfigurationError

NORMS = ("layernorm", "rmsnorm")
POSITIONS = ("sinusoidal", "learned", "rope")
ACTIVATIONS = ("gelu", "relu", "relu2", "silu", "swiglu")


@dataclass
class ModelConfig(Config):
    """Architecture of a decoder-only transformer.

    The defaults describe a GPT-2-like model with fixed positions. For a small model trained from scratch,
    `ModelConfig.preset("speedrun-mini")` learns faster.
    """

    error: ClassVar[type[ConfigurationError]] = ModelConfigurationError
    section: ClassVar[str] = "model"

    vocab_size: int = 50000
    """Rows of the embedding: the tokenizer's `vocab_size`, or more."""
    d_model: int = 768
    """Width of the residual stream; a multiple of `n_heads`."""
    n_heads: int = 12
    """Query heads of each attention."""
    n_layers: int = 12
    """Blocks."""
    d_ff: int = 3072
    """Inner width of the feed-forward; `swiglu` has two projections of this width."""
    max_seq_len: int = 1024
    """Longest sequence, in tokens, that the model takes or generates."""
    dropout: float = 0.1
    """Probability of dropping an element of the embedding and of each sub-layer's output, in training."""
    attention_dropout: float = 0.1
    """Probability of dropping an attention weight, in training."""
    activation: str = "gelu"
    """`gelu` (the tanh form of GPT-2), `relu`, `relu2` (its square), `silu`, or the gated `swiglu`."""
    pre_norm: bool = True
    """Normalise before each sub-layer (and once at the end); False normalises after the residual sum."""
    use_learned_pos_emb: bool = False
    """True is the same as `positions="learned"`."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
    n_kv_heads: int | None = None
    """Key and value heads, a divisor of `n_heads`; None means `n_heads`."""
    norm: str = "layernorm"
    """`layernorm` or `rmsnorm`."""
    norm_eps: float = 1e-5
    """Added to the variance (or mean square) inside each norm."""
    positions: str = "sinusoidal"
    """`sinusoidal` (fixed, added), `learned` (added), or `rope` (rotation of queries and keys)."""
    rope_theta: float = 10000.0
    """Base of the rotation's wavelengths; read with `positions="rope"`."""
    qk_norm: bool = False
    """Scale each head's queries and keys to unit root mean square before their product."""
    tie_embeddings: bool = True
    """Use the embedding as the output projection too."""
    bias: bool = True
    """Biases in the linear layers and layer norms; the output projection never has one."""
    logit_softcap: float | None = None
    """Bound c of the logits, as c * tanh(logits / c); None leaves them."""
    zero_init_projections: bool = False
    """Start each sub-layer's output projection at zero, so that the model begins as its embedding."""

    def __post_init__(self) -> None:
        if self.use_learned_pos_emb is True and self.positions != "rope":
            self.positions = "learned"
        elif self.positions == "learned" and self.use_learned_pos_emb is False:
            self.use_learned_pos_emb = True
        super().__post_init__()

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """Return a known shape, `changes` made to its fields.

        Args:
            name: A family and a size. `gpt2` is GPT-2's published architecture, `llama` is Llama's, and
                `speedrun` what learns fastest from few tokens. `mini` has 21M parameters and trains on a
                CPU, `small` 124M, `medium` 355M; families of one size differ by less than 2% at the same
                vocabulary.
            changes: Fields to set instead, such as `vocab_size`; the others stay (`d_ff` does not follow
                `d_model`).

        Raises:
            ModelConfigurationError: There is no such preset or field, or no model can be built.
        """
        return cls.from_dict(preset_fields(name) | changes)

    @staticmethod
    def presets() -> tuple[str, ...]:
        """Return the names that `preset` knows."""
        return NAMES

    def validate(self) -> None:
        """Check every field.

        Raises:
            ModelConfigurationError: No model can be built; the message says what is allowed.
        """
        for name in ("vocab_size", "d_model", "n_heads", "n_layers", "d_ff", "max_seq_len"):
            self._check_int(name, least=1)
        self._check_int("n_kv_heads", least=1, optional=True)
        for name in ("dropout", "attention_dropout"):
            self._check_float(name, most=1.0, open_high=True)
        for name in ("norm_eps", "rope_theta"):
            self._check_float(name, open_low=True)
        self._check_float("logit_softcap", open_low=True, optional=True)
        self._check_choice("activation", ACTIVATIONS)
        self._check_choice("norm", NORMS)
        self._check_choice("positions", POSITIONS)
        self._check_flags(
            "pre_norm",
            "use_learned_pos_emb",
            "gradient_checkpointing",
            "qk_norm",
            "tie_embeddings",
            "bias",
            "zero_init_projections",
        )
        if self.d_model % self.n_heads:
            raise ModelConfigurationError(
                f"d_model ({self.d_model}) must be a multiple of n_heads ({self.n_heads}); "
                f"the nearest widths are {self.d_model // self.n_heads * self.n_heads or self.n_heads} "
                f"and {(self.d_model // self.n_heads + 1) * self.n_heads}."
            )
        if self.n_heads % self.kv_heads:
            raise ModelConfigurationError(
                f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})."
            )
        if self.positions == "rope" and self.d_head % 2:
            raise ModelConfigurationError(
                f'positions="rope" rotates pairs, so d_model // n_heads must be even, not {self.d_head}.'
            )
        if self.use_learned_pos_emb != (self.positions == "learned"):
            raise ModelConfigurationError(
                f"use_learned_pos_emb={self.use_learned_pos_emb} contradicts positions={self.positions!r}."
            )

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads
