"""What all ternary layers share: a float weight that is packed for evaluation, and for good by `deploy`."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, cast

import torch
from bitcore.config import BitQuantConfig
from bitcore.exceptions import QuantizationError
from bitcore.ops import bitlinear
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["TernaryLayer"]

# Where a tensor is held, its name, itself, and what changes with its values and its place. Those that were
# made in inference mode have no version.
_Source = tuple[Mapping[str, Tensor | None], str, Tensor, int | None, int]
_Sources = tuple[int, list[_Source]]


class TernaryLayer(nn.Module):
    """A layer with one ternary weight.

    In training it keeps a float weight, which each step rounds. In evaluation the weight is packed at the
    first call and again whenever it changed. `deploy` drops the float weight: from then on the layer and its
    state dict hold `qweight` and `qweight_scale` in its place.
    """

    scale_follows_dtype: ClassVar[bool] = False
    """Whether `half()` and its like convert `qweight_scale` too; where they do not, it stays fp32."""

    weight: nn.Parameter | None
    """The float weight; None once the layer is deployed."""
    qweight: Tensor | None
    """The packed codes, uint8; None in training."""
    qweight_scale: Tensor | None
    """What codes are multiplied by, fp32; None in training."""

    def __init__(
        self,
        shape: tuple[int, ...],
        quant_config: BitQuantConfig | Mapping[str, Any] | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.quant_config = BitQuantConfig.of(quant_config)
        self.weight_shape = shape
        self.strength = 1.0
        """How much of the rounding is done in training: 0 none, 1 all. Evaluation always rounds."""
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        # Buffers once the layer is deployed; until then what averages and copies buffers shall not see them.
        self.qweight = self.qweight_scale = None
        self._packed: tuple[Tensor, Tensor] | None = None
        self._kept_of: _Sources | None = None

    @abstractmethod
    def _begin(self, weight: nn.Parameter) -> None:
        """Fill the weight, and what other parameters there are, as training begins with them."""

    @abstractmethod
    def _pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and the packed codes of a weight."""

    @abstractmethod
    def _packed_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of the scale and of the packed codes."""

    @abstractmethod
    def _unpack(self, qweight: Tensor) -> Tensor:
        """Return the codes that `_pack` packed, int8 in the weight's shape."""

    @property
    def is_deployed(self) -> bool:
        """Whether the float weight is gone."""
        return self._parameters.get("weight", self) is None

    def reset_parameters(self) -> None:
        """Begin anew.

        Raises:
            QuantizationError: The layer is deployed.
        """
        if self.weight is None:
            raise QuantizationError("a deployed layer has no float weight to reset.")
        self._begin(self.weight)

    @torch.inference_mode(False)
    @torch.no_grad()
    def deploy(self) -> Self:
        """Drop the float weight and keep packed codes, 2 bits a weight, for good. Return the layer.

        On the meta device the packed weight is empty, for a checkpoint to be loaded into.

        Raises:
            QuantizationError: The weight holds NaN or infinity. The layer stays as it was.
        """
        if self.weight is None:
            return self
        if "weight" not in self._parameters:
            raise QuantizationError(
                "the weight is computed by a parametrization; make it a parameter again with "
                "torch.nn.utils.parametrize.remove_parametrizations before deploy()."
            )
        device = self.weight.device
        if device.type == "meta":
            scale_shape, packed_shape = self._packed_shapes()
            scale = torch.empty(scale_shape, device=device, dtype=self._scale_dtype(self.weight))
            packed = torch.empty(packed_shape, device=device, dtype=torch.uint8)
        else:
            scale, packed = self._pack(self.weight)
        self.forget_packed()
        self.weight = None
        del self.qweight, self.qweight_scale
        self.register_buffer("qweight_scale", scale)
        self.register_buffer("qweight", packed)
        return self.eval()

    def train(self, mode: bool = True) -> Self:
        """Go to training, or to evaluation with `mode=False`.

        Raises:
            QuantizationError: The layer is deployed and has no weight to train.
        """
        if mode and self.is_deployed:
            raise QuantizationError(
                f"this {type(self).__name__} is deployed: its float weight is gone, so it cannot be trained. "
                "Train a layer that holds the float weight, and deploy a copy of it."
            )
        self.forget_packed()
        return super().train(mode)

    @property
    def _form(self) -> str:
        """How `extra_repr` ends."""
        return ", deployed" if self.is_deployed else ""

    @property
    def weight_count(self) -> int:
        """How many weights there are, packed or not."""
        return math.prod(self.weight_shape)

    @property
    def packed_bytes(self) -> int:
        """What the packed weight and its scale take, now or after `deploy`."""
        scale, codes = self._packed_shapes()
        weight = self.qweight_scale if self.weight is None else self.weight
        return math.prod(codes) + math.prod(scale) * self._scale_dtype(cast("Tensor", weight)).itemsize

    def packed(self) -> tuple[Tensor, Tensor]:
        """Return `qweight_scale` and `qweight`, which are brought up to date where the weight has changed.

        Changes that are made through `weight.data` are not seen; `eval()` looks at the weight again.

        Raises:
            QuantizationError: The weight holds NaN or infinity.
        """
        if self.weight is None:
            return cast("Tensor", self.qweight_scale), cast("Tensor", self.qweight)
        # Asked before it is read: other threads keep the packed weight first and what it is of last.
        packed = None if self._is_stale() else self._packed
        if packed is None:
            self.forget_packed()
            sources = self._sources()
            # Not as tensors of inference mode, which gradients could not be computed with later.
            with torch.inference_mode(False), torch.no_grad():
                packed = self._pack(self.weight)
            self.qweight_scale, self.qweight = self._packed = packed
            self._kept_of = sources
        return packed

    def ternary_weight(self) -> tuple[Tensor, Tensor]:
        """Return the scale as it is stored, and the codes, int8 of -1, 0 and 1 in the weight's shape.

        Raises:
            QuantizationError: The weight holds NaN or infinity.
        """
        with torch.no_grad():
            scale, qweight = self.packed()
            return scale, self._unpack(qweight)

    def _computes_on_floats(self, *tensors: Tensor | None) -> bool:
        """Return whether what is computed of these is to be differentiated or traced, and so not on codes.

        Raises:
            QuantizationError: In evaluation the weight holds NaN or infinity.
        """
        if self.training or (torch.compiler.is_compiling() and self.weight is not None):
            return True
        if not torch.compiler.is_compiling():
            if bitlinear.is_transformed():
                return True
            self.packed()
        return wants_gradients(*tensors)

    @property
    def _strength(self) -> float:
        """How much of the rounding is done where gradients are wanted."""
        return self.strength if self.training else 1.0

    def _scale_dtype(self, weight: Tensor) -> torch.dtype:
        return weight.dtype if self.scale_follows_dtype else torch.float32

    def _sources(self) -> _Sources:
        """Return what that depends on which is kept for evaluation, to be taken before it is made."""
        found: list[_Source] = []
        for name in ("qweight", "qweight_scale", "bias") if self.is_deployed else ("weight", "bias"):
            tensor = getattr(self, name, None)
            held = self._buffers if name in self._buffers else self._parameters
            if isinstance(tensor, Tensor):
                version = None if tensor.is_inference() else tensor._version
                found.append((held, name, tensor, version, tensor.data_ptr()))
        return _steps[0], found

    def _is_stale(self) -> bool:
        kept_of = self._kept_of
        if kept_of is None:
            return True
        steps, sources = kept_of
        # Optimisers that are fused do not count as changes of a tensor.
        if steps != _steps[0] and self.weight is not None:
            return True
        for held, name, tensor, version, pointer in sources:
            # A weight that is computed whenever it is asked for is no parameter, and is packed each time.
            if held.get(name) is not tensor or tensor.data_ptr() != pointer:
                return True
            if version is not None and tensor._version != version:
                return True
        return False

    def forget_packed(self) -> None:
        """Drop what is kept for evaluation, so that the weight is looked at again."""
        self._kept_of = self._packed = None
        if not self.is_deployed:
            self.qweight = self.qweight_scale = None

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.forget_packed()
        scale = self.qweight_scale
        cast("Any", super())._apply(fn, recurse)
        moved = self.qweight_scale
        if scale is not None and moved is not None and not self.scale_follows_dtype:
            self.qweight_scale = moved if moved.dtype == scale.dtype else scale.to(moved.device)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: Any, *args: Any, **kwargs: Any) -> None:
        name = prefix.removesuffix(".") or f"this {type(self).__name__}"
        if self.is_deployed and prefix + "weight" in state_dict:
            raise QuantizationError(
                f"{name} is deployed, but the state dict holds its float weight. Load it before deploy()."
            )
        if not self.is_deployed and prefix + "qweight" in state_dict:
            raise QuantizationError(
                f"{name} holds a float weight, but the state dict is that of a deployed layer. "
                "Call deploy() before loading it."
            )
        cast("Any", super())._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.forget_packed()

    def __getstate__(self) -> dict[str, Any]:
        own = {} if self.is_deployed else {"qweight": None, "qweight_scale": None}
        return self.__dict__ | {"_kept_of": None, "_packed": None} | own


def begin_bias(bias: nn.Parameter | None, terms: int) -> None:
    """Fill a bias as torch's layers do, whose outputs are sums of that many products."""
    if bias is not None:
        bound = 1 / math.sqrt(terms)
        nn.init.uniform_(bias, -bound, bound)


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Return whether what is computed of these is to have gradients."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def is_plain(x: Tensor) -> bool:
    """Return whether x is memory that is computed with now: no subclass, nothing that records or pretends."""
    return (
        type(x) is Tensor
        and not x.is_neg()
        and not _modes()
        and not _tracing()
        and not bitlinear.is_transformed()
    )


def _count_step(*_: Any) -> None:
    _steps[0] += 1


_torch: Any = torch
_modes: Callable[[], int] = _torch._C._len_torch_dispatch_stack
_tracing: Callable[[], bool] = _torch._C._is_tracing
any_autocast: Callable[[], bool] = _torch._C._is_any_autocast_enabled
_steps = [0]
"""How many steps optimisers have taken in this process."""
register_optimizer_step_post_hook(_count_step)
