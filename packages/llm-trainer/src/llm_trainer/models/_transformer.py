"""The language model. Letters: B batch, T tokens, D model width, V vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from llm_trainer.config import ModelConfig
from llm_trainer.config._base import check_type
from llm_trainer.exceptions import FormatError, ModelInputError
from llm_trainer.models import _hf_files, _model_files
from llm_trainer.models._attention import allowed_pairs
from llm_trainer.models._blocks import Block, build_block, build_norm, initialise_block_
from llm_trainer.models._cache import KVCache
from llm_trainer.models._causal_attention import document_runs, serves
from llm_trainer.models._evaluation_mode import evaluation_mode
from llm_trainer.models._fast_ops import Linear
from llm_trainer.models._generation import GenerationSettings, generate_tokens
from llm_trainer.models._hf_files import SavedTokenizer
from llm_trainer.models._loss import linear_cross_entropy, next_token_targets, soft_cap
from llm_trainer.models._positions import Rope, SinusoidalPositions

_EMBEDDING_STD = 0.02


@dataclasses.dataclass(frozen=True)
class ModelOutput:
    """What `TransformerLM.forward` returns: `output.loss`, `output["loss"]`, and `loss, logits = output`
    all work.
    """

    loss: Tensor | None
    """Mean cross-entropy in nats over the labelled tokens; None without labels."""
    logits: Tensor | None
    """(B, T, V) in float32; None with `return_logits=False`."""

    def __getitem__(self, key: str | int) -> Tensor | None:
        """Return a field by name or by its place, as Hugging Face outputs do."""
        if isinstance(key, int):
            return (self.loss, self.logits)[key]
        if key not in {"loss", "logits"}:
            raise KeyError(f"{key!r}; a ModelOutput has 'loss' and 'logits'")
        return cast("Tensor | None", getattr(self, key))

    def __iter__(self) -> Iterator[Tensor | None]:
        return iter((self.loss, self.logits))


class TransformerLM(nn.Module):
    """A decoder-only transformer, as `ModelConfig` describes it.

    Raises:
        ModelConfigurationError: `config` is no `ModelConfig`, or was changed into an impossible one.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        check_type(config, ModelConfig, "config")
        config.validate()
        self.config = dataclasses.replace(config)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding: nn.Module | None = None
        self.rope: Rope | None = None
        match config.positions:
            case "learned":
                self.position_embedding = nn.Embedding(config.max_seq_len, config.d_model)
            case "sinusoidal":
                # The square root of two gives the sines the spread of the embedding.
                scale = _EMBEDDING_STD * 2**0.5
                self.position_embedding = SinusoidalPositions(config.d_model, scale)
            case _:
                self.rope = Rope(config.d_head, config.rope_theta)
        self.blocks = nn.ModuleList(build_block(config) for _ in range(config.n_layers))
        self.final_norm = build_norm(config) if config.pre_norm else None
        self.head = Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.run_block: Callable[..., Tensor] = Block.__call__
        """What runs a block without a cache; `compile_blocks_` replaces it."""
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.embedding.weight, std=_EMBEDDING_STD)
        if isinstance(self.position_embedding, nn.Embedding):
            nn.init.normal_(self.position_embedding.weight, std=_EMBEDDING_STD)
        if not self.config.tie_embeddings:
            nn.init.normal_(self.head.weight, std=_EMBEDDING_STD)
        for block in self._blocks():
            initialise_block_(block, self.config)

    def _blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        return_logits: bool = True,
        cache: KVCache | None = None,
    ) -> ModelOutput:
        """Predict each next token.

        Args:
            input_ids: (B, T) token ids.
            attention_mask: (B, T) integers. 0 is padding. Other numbers tell documents apart: a token sees
                only tokens of its own number, and its position is how many of them stand before it, so packed
                documents do not see one another. An ordinary mask of ones and zeros is a special case.
            labels: (B, T) ids, usually `input_ids` itself: label t is compared with the prediction at t - 1,
                so the shift is done here. -100 is not counted.
            return_logits: False, with labels, never holds all the logits, which saves time and memory.
            cache: Keys and values of earlier tokens, to which these are added; without `attention_mask` or
                labels.

        Raises:
            ModelInputError: Shapes do not fit, the ids are no integers or (on a CPU) not in the vocabulary,
                the sequence is longer than `max_seq_len` or has no room in the cache, or a cache comes with
                labels, a mask, or gradient checkpointing in training. It is a `ValueError` too.
        """
        if cache is not None and labels is not None:
            raise ModelInputError(
                "labels and cache cannot be used together: the first token would have no loss."
            )
        hidden_BTD = self._hidden(input_ids, attention_mask, cache)
        loss = None
        if labels is not None:
            if labels.shape != input_ids.shape:
                raise ModelInputError(
                    f"labels have shape {tuple(labels.shape)}, input_ids {tuple(input_ids.shape)}; they "
                    f"must be equal."
                )
            loss = linear_cross_entropy(
                hidden_BTD.flatten(0, 1),
                self.head.weight,
                next_token_targets(labels).flatten(),
                self.config.logit_softcap,
            )
        logits = None
        if return_logits or labels is None:
            logits = soft_cap(self.head(hidden_BTD).float(), self.config.logit_softcap)
        return ModelOutput(loss, logits)

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor | None, cache: KVCache | None) -> Tensor:
        if input_ids.dim() != 2:
            raise ModelInputError(f"input_ids must have shape (batch, tokens), not {tuple(input_ids.shape)}.")
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise ModelInputError(f"input_ids must be int64 or int32, not {input_ids.dtype}.")
        recomputes = self.config.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if cache is not None and recomputes:
            raise ModelInputError(
                "gradient_checkpointing runs each block twice in training, which would fill the cache twice; "
                "call model.eval() or use torch.no_grad()."
            )
        start = cache.length if cache is not None else 0
        end = start + input_ids.size(1)
        if end > self.config.max_seq_len:
            raise ModelInputError(
                f"The sequence has {end} tokens, more than max_seq_len ({self.config.max_seq_len}); "
                "give the model shorter ones, or make one with a larger max_seq_len."
            )
        positions = torch.arange(start, end, device=input_ids.device)
        mask = documents = None
        if attention_mask is not None:
            if cache is not None:
                raise ModelInputError(
                    "attention_mask and cache cannot be used together: prompts must be of equal length."
                )
            if attention_mask.shape != input_ids.shape:
                raise ModelInputError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids "
                    f"{tuple(input_ids.shape)}; "
                    "they must be equal."
                )
            if not torch.all(attention_mask == attention_mask[:, :1]) or not torch.all(attention_mask[:, 0]):
                if serves(input_ids.device):
                    documents = document_runs(attention_mask)
                if documents is None:
                    mask = allowed_pairs(attention_mask)
                positions = _positions_in_segments(attention_mask)
        elif cache is not None and start > 0 and input_ids.size(1) > 1:
            columns = torch.arange(end, device=input_ids.device)
            mask = (columns <= positions[:, None])[None, None]
        try:
            x_BTD = self.embedding(input_ids)
        except IndexError:
            raise ModelInputError(
                f"input_ids hold ids from {int(input_ids.min())} to {int(input_ids.max())}, the model has a "
                f"vocabulary of {self.config.vocab_size}; use the tokenizer that it was trained with."
            ) from None
        if self.position_embedding is not None:
            x_BTD = x_BTD + self.position_embedding(positions).to(x_BTD.dtype)
        rope = self.rope(positions, x_BTD.dtype) if self.rope is not None else None
        if self.config.dropout:
            x_BTD = F.dropout(x_BTD, self.config.dropout, self.training)
        for index, block in enumerate(self.blocks):
            if cache is not None:
                x_BTD = block(x_BTD, rope, mask, cache=cache.layers[index])
            elif recomputes:
                x_BTD = checkpoint(self.run_block, block, x_BTD, rope, mask, documents, use_reentrant=False)
            else:
                x_BTD = self.run_block(block, x_BTD, rope, mask, documents)
        return x_BTD if self.final_norm is None else self.final_norm(x_BTD)

    def next_logits(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the float32 logits (B, V) of the token after the last; cheaper than those of all
        positions.
        """
        last_BD = self._hidden(input_ids, None, cache)[:, -1]
        return soft_cap(self.head(last_BD).float(), self.config.logit_softcap)

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """Return an empty cache with room for `capacity` tokens a row."""
        weight = self.embedding.weight
        device = weight.device
        dtype = (
            torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype
        )
        return KVCache(
            n_layers=self.config.n_layers,
            batch_size=batch_size,
            kv_heads=self.config.kv_heads,
            capacity=capacity,
            d_head=self.config.d_head,
            dtype=dtype,
            device=device,
        )

    # Not inference_mode, whose tensors cannot be used in a later computation of gradients.
    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_length: int = 100,
        *,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        do_sample: bool | None = None,
        num_beams: int = 1,
        repetition_penalty: float = 1.0,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Continue prompts of equal length, in evaluation mode.

        Args:
            input_ids: (B, T) prompts.
            max_length: Most tokens in the result, the prompt included; `max_seq_len` bounds it too.
            max_new_tokens: Most tokens to add, instead of `max_length`.
            temperature: Divides the logits; 0 is greedy.
            top_k: Sample from the k likeliest tokens only.
            top_p: Sample from the fewest likeliest tokens whose probabilities reach p.
            do_sample: None samples when a temperature other than 1, `top_k` or `top_p` is given, and is
                greedy otherwise.
            num_beams: Only 1.
            repetition_penalty: Above 1, makes tokens that are there already less likely (Keskar et al.,
                2019).
            eos_token_id: Token after which a row is finished.
            pad_token_id: What follows in finished rows; `eos_token_id` by default.
            generator: Source of randomness, for repeatable samples.
            use_cache: False computes everything anew at each token: slow, for comparison.

        Returns:
            (B, L) prompts and continuations, L at most `max_length`.

        Raises:
            GenerationError: A parameter is impossible, or the prompt leaves no room.
        """
        settings = GenerationSettings(
            max_length=max_length if max_new_tokens is None else input_ids.size(-1) + max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            do_sample=do_sample,
            num_beams=num_beams,
            repetition_penalty=repetition_penalty,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            use_cache=use_cache,
        )
        with evaluation_mode(self):
            return generate_tokens(self, input_ids, settings, generator)

    def get_num_params(self, trainable_only: bool = False) -> int:
        """Return the number of parameters, tied ones counted once.

        Args:
            trainable_only: Leave out those that need no gradient.
        """
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)

    def get_model_size_mb(self) -> float:
        """Return the size of the parameters in MB (2**20 bytes)."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters()) / 2**20

    def save_pretrained(
        self,
        save_directory: str | Path,
        max_shard_size: int | str = "5GB",
        *,
        tokenizer_fingerprint: str | None = None,
    ) -> None:
        """Write the weights and `config.json`; tied weights once.

        The weights are in `model.safetensors`, or, where that would be larger than `max_shard_size`, in
        several files and `model.safetensors.index.json`. All are complete before one of an earlier save is
        replaced. A crash leaves the old model, the new one, or files of both that `from_pretrained` refuses.

        Args:
            save_directory: Folder, made if it is missing. Weights of an earlier save in it are removed.
            max_shard_size: Most bytes of tensors in a file, as a number or as text such as `5GB` (10**9) or
                `512MiB` (2**20). A larger tensor has a file of its own.
            tokenizer_fingerprint: `BPETokenizer.fingerprint()` of the tokenizer that the model is to be used
                with; `Trainer.from_pretrained` then refuses another one.

        Raises:
            ConfigurationError: `max_shard_size` is not a size.
            OSError: A file cannot be written; the model that was there before is still whole.
        """
        _model_files.write_model(
            Path(save_directory),
            self.config,
            self.state_dict(),
            max_shard_size=max_shard_size,
            tokenizer_sha256=tokenizer_fingerprint,
        )

    @classmethod
    def from_pretrained(cls, load_directory: str | Path, device: str | torch.device = "cpu") -> Self:
        """Read what `save_pretrained` wrote, in evaluation mode and in the types it was saved in.

        Raises:
            FormatError: A file is missing, damaged, newer than this release, or of another model.
        """
        config, weights = _model_files.read_model(Path(load_directory))
        model = cls._without_weights(config, load_directory)
        _model_files.check_state(weights, model.state_dict(), config)
        return model._with_weights(weights.read(device=device))

    def export_hf(
        self,
        directory: str | Path,
        tokenizer: SavedTokenizer | None = None,
        *,
        max_shard_size: int | str = "5GB",
    ) -> None:
        """Write a checkpoint that `transformers.AutoModelForCausalLM.from_pretrained` loads.

        A model with `positions="rope"`, `norm="rmsnorm"` and `activation="swiglu"` becomes a Llama, one with
        `learned`, `layernorm`, `gelu` and biases a GPT-2; the logits are the same. What only matters in
        training has no place there: `gradient_checkpointing`, `zero_init_projections`, and a Llama's
        `dropout`. transformers itself is not needed.

        Args:
            directory: Folder, made if it is missing. A checkpoint that is there is replaced.
            tokenizer: Is saved there too, and its special tokens become the model's. Without it, tokenizer
                files that are there stay.
            max_shard_size: As in `save_pretrained`.

        Raises:
            ModelConfigurationError: transformers has no such model (the fields in the way are named), or the
                tokenizer has more tokens than the model.
            ConfigurationError: `max_shard_size` is not a size.
            FileExistsError: The folder holds a model that `save_pretrained` wrote.
            OSError: A file cannot be written.
        """
        _hf_files.write_checkpoint(Path(directory), self.config, self.state_dict(), tokenizer, max_shard_size)

    @classmethod
    def from_hf(
        cls,
        directory: str | Path,
        device: str | torch.device = "cpu",
        *,
        dtype: torch.dtype | None = torch.float32,
    ) -> Self:
        """Read a Llama or GPT-2 checkpoint of transformers from a local folder, in evaluation mode.

        Args:
            directory: Folder with `config.json` and the weights in safetensors, in one file or several.
            device: Where to put the model.
            dtype: Type of its parameters. Half precision becomes float32 by default, which training needs
                (`TrainingConfig.use_amp` computes in half precision all the same); None keeps each tensor's.

        Raises:
            FormatError: A file is missing, damaged, or pickled, or does not fit the others.
            ModelConfigurationError: The model is of another architecture, or uses what this one lacks, such
                as scaled rotations or a sliding window; the field and its value are named.
        """
        checkpoint = _hf_files.Checkpoint(Path(directory))
        model = cls._without_weights(checkpoint.config, directory)
        return model._with_weights(checkpoint.state(model.state_dict(), dtype, device))

    @classmethod
    def _without_weights(cls, config: ModelConfig, directory: str | Path) -> Self:
        try:
            with torch.device("meta"):
                return cls(config)
        except (RuntimeError, OverflowError) as error:
            raise FormatError(f"{directory}: config.json asks for an impossible size: {error}") from error

    def _with_weights(self, state: dict[str, Tensor]) -> Self:
        self.load_state_dict(_model_files.untied(state, self.config), strict=True, assign=True)
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight
        return self.eval()


def _positions_in_segments(segments_BT: Tensor) -> Tensor:
    """Count how many tokens of its own number stand before each token, wherever they stand.

    A mask of ones and zeros gives what transformers counts from it, `cumsum(mask) - 1`, holes or none.
    """
    # Sorted by number, each number's tokens are together and, the sort being stable, in order.
    numbers, order = segments_BT.sort(dim=1, stable=True)
    index = torch.arange(segments_BT.size(1), device=segments_BT.device).expand_as(segments_BT)
    starts = F.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=False)
    ranks = index - torch.where(starts, index, 0).cummax(dim=1).values
    return torch.empty_like(ranks).scatter_(1, order, ranks)
