"""The logits of the token that comes next, from a causal language model that is fed piece by piece."""

from __future__ import annotations

import inspect
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from auto_round._files import shown
from auto_round.exceptions import CalibrationError


def text_config(model: Any) -> Any:
    """Return the configuration of a model's language part; None where the model has none."""
    config = getattr(model, "config", None)
    nested = getattr(config, "get_text_config", None)
    return config if nested is None else nested()


def cache_bytes_per_row(config: Any, *, seqlen: int, dtype: torch.dtype) -> int:
    """Return what the keys and values of one sequence take in a transformers model with full attention.

    Windows of attention and recurrent layers need less. While a layer's part grows by a token it is there
    twice, so the peak is higher by one layer's share of the whole batch.
    """
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * kv_heads * width * seqlen * dtype.itemsize


class NextToken:
    """Runs a model over ids that grow, each time over no more than what is new if the model has a cache.

    Args:
        model: A causal language model of transformers; or any callable that takes ids, int64 [B, T], and
            returns logits [B, T, V] or [B, V], or an object that has them as `logits`. Such a callable, and a
            model that keeps no cache of keys and values, is run over the whole sequence each time.
        device: Where the ids go; None means where the weights are, or the CPU if they come when needed.

    Raises:
        CalibrationError: The model has no head that predicts the next token.
    """

    def __init__(self, model: Any, *, device: torch.device | str | None = None) -> None:
        self._model = model
        self._options: dict[str, Any] = {}
        self._is_transformers = callable(getattr(model, "can_generate", None))
        if self._is_transformers:
            _check_is_causal(model)
            if "logits_to_keep" in inspect.signature(model.forward).parameters:
                self._options["logits_to_keep"] = 1
        elif not callable(model):
            raise CalibrationError(f"The model is {shown(model)}, which cannot be called with token ids.")
        self._device = _device_of(model) if device is None else torch.device(device)
        self.restart()

    def restart(self) -> None:
        """Forget what was fed, and the cache."""
        self._cache: Any = None
        self._fed = 0
        self._last: Tensor | None = None

    def logits(self, ids_BT: Tensor) -> Tensor:
        """Return the logits after the last of `ids_BT`: float32 [B, V] on the CPU.

        `ids_BT`, int64, must begin with the ids of the call before, unless `restart` came between.

        Raises:
            CalibrationError: The logits are not finite, have another form, or change with later tokens.
        """
        new = ids_BT.shape[1] - self._fed
        if self._is_transformers:
            found, self._cache = self._run(ids_BT, new)
        else:
            found = self._model(ids_BT.to(self._device))
            found = getattr(found, "logits", found)
        found = self._checked(found, ids_BT, new)
        self._fed = ids_BT.shape[1]
        return found

    def _run(self, ids_BT: Tensor, new: int) -> tuple[Any, Any]:
        options = dict(self._options)
        if self._cache is not None:
            ids_BT = ids_BT[:, -new:]
            options["past_key_values"] = self._cache
        elif self._fed and options:
            options["logits_to_keep"] = new + 1
        out = self._model(input_ids=ids_BT.to(self._device), use_cache=True, **options)
        return out.logits, getattr(out, "past_key_values", None)

    def _checked(self, found: Any, ids_BT: Tensor, new: int) -> Tensor:
        if not isinstance(found, Tensor) or found.dim() not in (2, 3) or len(found) != len(ids_BT):
            what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise CalibrationError(
                f"The model returns {what} for ids of shape {list(ids_BT.shape)}; it must return logits "
                "[B, T, V] or [B, V]."
            )
        if found.dim() == 3:
            if self._cache is None and self._last is not None and found.shape[1] > new:
                _check_unchanged(self._last, found[:, -1 - new].float().cpu())
            found = found[:, -1]
        found = found.detach().float().cpu()
        most = found.amax(-1)
        if not bool(most.isfinite().all()):
            row = int((~most.isfinite()).nonzero()[0])
            raise CalibrationError(
                f"The model's logits after token {ids_BT.shape[1]} of row {row} are {float(most[row])}, so "
                "it can write no text. Its weights are damaged, or overflow in their dtype: try bfloat16 or "
                "float32."
            )
        self._last = found
        return found


def _check_is_causal(model: Any) -> None:
    name = type(model).__name__
    if not model.can_generate():
        raise CalibrationError(
            f"{name} has no head that predicts the next token, so it can write no text of its own. Load it "
            "with AutoModelForCausalLM if it is such a model, or set quantization.calibration to 'user'."
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise CalibrationError(
            f"{name} answers an input and writes no text by itself; set quantization.calibration to 'user'."
        )


def _check_unchanged(before_BV: Tensor, after_BV: Tensor) -> None:
    # A hundredth of the spread is far above rounding, and far below what a token that is seen does.
    spread = float(before_BV.masked_fill(~before_BV.isfinite(), 0.0).std())
    if not torch.allclose(before_BV, after_BV, rtol=1e-2, atol=1e-2 * spread):
        raise CalibrationError(
            "The model's logits for a token change with the tokens after it: it looks at the whole text, and "
            "predicts no next token. Set quantization.calibration to 'user'."
        )


def _device_of(model: Any) -> torch.device:
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            # Weights that come when they are needed lie on meta until then.
            if not parameter.is_meta:
                return parameter.device
    return torch.device("cpu")


@contextmanager
def evaluating(model: Any) -> Generator[None]:
    """Run a model without dropout and gradients; afterwards every module is in the mode it was in."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
