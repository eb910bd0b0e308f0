"""Models whose layers become ternary."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeVar, cast

import torch
from bitcore.config import BitQuantConfig
from bitlayers import BitConv2d, BitEmbedding, BitLinear, SubLN
from bitlayers.utils import check_finite
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from bitmodels.exceptions import QuantizationError

__all__ = ["ConversionWarning", "convert_pytorch_model", "replace_linear_layers"]

_Model = TypeVar("_Model", bound=nn.Module)


class ConversionWarning(UserWarning):
    """Layers were rounded to ternary weights that were trained as floats."""


def replace_linear_layers(
    model: nn.Module,
    layer_class: type[BitLinear] = BitLinear,
    quant_config: BitQuantConfig | Mapping[str, Any] | None = None,
    *,
    exclude: str | Iterable[str] = (),
    norm: bool = False,
    subclasses: bool = False,
) -> nn.Module:
    """Put a ternary layer in the place of each `torch.nn.Linear` of a model, and return the model.

    The new layers take the parameters of the old ones, so that an optimiser still holds them, and their
    hooks. Left as they are: subclasses of `torch.nn.Linear` and layers whose `forward` was replaced, which
    may compute something else; layers that share their weight with one of another kind, such as a head that
    is the embedding too; and layers whose weight is computed of others (`weight_norm`, `spectral_norm`,
    pruning and other parametrizations), until what computes it is removed.

    Args:
        model: Changed in place; a `torch.nn.Linear` itself is left alone, and its ternary layer returned.
        layer_class: What layers become.
        quant_config: How they quantise, also as a dictionary; BitNet's own way if None.
        exclude: Names of layers that stay, or of what holds them, with `*` for anything, such as `lm_head` or
            `*.gate`.
        norm: Put a `SubLN` before each new layer. Training needs it more than conversion does: it begins with
            other outputs than the float layer's.
        subclasses: Replace subclasses of `torch.nn.Linear` too, which you know to compute the same.

    Raises:
        QuantizationError: A name in `exclude` fits no layer, or `layer_class` is no `BitLinear`.
    """
    if not (isinstance(cast("object", layer_class), type) and issubclass(layer_class, BitLinear)):
        raise QuantizationError(f"layer_class is {layer_class!r}; it must be BitLinear or a subclass of it.")
    kinds = _kinds(model, (nn.Linear,), subclasses)
    return _replaced(model, kinds, layer_class, quant_config, _patterns(exclude), norm)[0]


def convert_pytorch_model(
    model: _Model,
    quant_config: BitQuantConfig | Mapping[str, Any] | None = None,
    *,
    exclude: str | Iterable[str] = (),
    norm: bool = False,
    convolutions: bool = False,
    embeddings: bool = False,
    subclasses: bool = False,
) -> _Model:
    """Return a copy of a model with ternary layers in place of its linear ones.

    Weights that were trained as floats lose much by being rounded: a `ConversionWarning` says so. `finetune`
    makes up for most of it. What is left as it is, `replace_linear_layers` says; beside that embeddings that
    keep their vectors short (`max_norm`) or weigh gradients by frequency.

    Args:
        model: Left as it is.
        quant_config: How layers quantise, also as a dictionary; BitNet's own way if None.
        exclude: Names of layers that stay, or of what holds them, with `*` for anything.
        norm: Put a `SubLN` before each new linear layer.
        convolutions: Convert each `torch.nn.Conv2d` too.
        embeddings: Convert each `torch.nn.Embedding` too.
        subclasses: Convert subclasses of all these too, which you know to compute the same.

    Raises:
        QuantizationError: There is nothing to convert, the model cannot be copied, a name in `exclude` fits
            no layer, or a weight holds NaN or infinity.
    """
    bases: tuple[type[nn.Module], ...] = (nn.Linear,)
    bases += (nn.Conv2d,) * convolutions + (nn.Embedding,) * embeddings
    kinds = _kinds(model, bases, subclasses)
    try:
        copied = copy.deepcopy(model)
    except RuntimeError as error:  # Of weight_norm's old form, whose weight is no leaf.
        raise QuantizationError(
            f"the model cannot be copied ({error}); convert it in place with replace_linear_layers."
        ) from error
    converted, names = _replaced(copied, kinds, BitLinear, quant_config, _patterns(exclude), norm)
    if not names:
        left = sorted(kind.__name__ for kind in _kinds(model, bases, True) - kinds)
        hint = f"; what there is are {', '.join(left)}, which subclasses=True would convert" if left else ""
        wanted = ", ".join(f"torch.nn.{base.__name__}" for base in bases)
        raise QuantizationError(f"the model has no {wanted} that could be converted{hint}.")
    check_finite(converted)
    warnings.warn(
        f"{len(names)} layers have ternary weights now that were trained as floats, which costs accuracy; "
        "train them with bitmodels.utils.finetune, and see with compare_models what is left of it.",
        ConversionWarning,
        stacklevel=2,
    )
    return cast("_Model", converted)


def _kinds(model: nn.Module, bases: tuple[type[nn.Module], ...], subclasses: bool) -> set[type[nn.Module]]:
    """Return the types of layers that are replaced."""
    found = {type(part) for part in model.modules() if isinstance(part, bases)} if subclasses else set(bases)
    # Its layer is computed by attention itself, from the weight.
    return found - {NonDynamicallyQuantizableLinear}


def _patterns(exclude: str | Iterable[str]) -> tuple[str, ...]:
    return (exclude,) if isinstance(exclude, str) else tuple(exclude)


def _stays(name: str, exclude: tuple[str, ...]) -> bool:
    """Return whether a layer, or what holds it, is excluded."""
    parts = name.split(".")
    holders = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(fnmatchcase(holder, pattern) for holder in holders for pattern in exclude)


def _replaced(
    model: nn.Module,
    kinds: set[type[nn.Module]],
    layer_class: type[BitLinear],
    quant_config: BitQuantConfig | Mapping[str, Any] | None,
    exclude: tuple[str, ...],
    norm: bool,
) -> tuple[nn.Module, list[str]]:
    """Replace layers of these kinds exactly, and return the model and the layers' names."""
    named = dict(cast("Iterable[tuple[str, nn.Module]]", model.named_modules(remove_duplicate=False)))
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in named):
            known = ", ".join(name for name, part in named.items() if type(part) in kinds)
            raise QuantizationError(f"exclude names {pattern!r}, which fits none of {known}.")
    users: dict[int, set[type[nn.Module]]] = {}
    for part in model.modules():
        for parameter in part.parameters(recurse=False):
            users.setdefault(id(parameter), set()).add(type(part))
    made: dict[int, nn.Module] = {}
    names: list[str] = []
    for name, part in named.items():
        shared = users.get(id(getattr(part, "weight", None)), set()) - {type(part)}
        if type(part) not in kinds or shared or _stays(name, exclude):
            continue
        if not _is_plain(part):
            continue
        if id(part) not in made:
            made[id(part)] = _ternary(part, layer_class, quant_config, norm)
        names.append(name)
        parent, _, own = name.rpartition(".")
        if not name:
            return made[id(part)], names
        setattr(named[parent], own, made[id(part)])
        _never_fast(named[parent])
    for part in model.modules():
        if isinstance(part, nn.TransformerEncoder) and any(
            isinstance(inner, BitLinear) for inner in part.modules()
        ):
            part.use_nested_tensor = False
    return model, names


def _is_plain(part: nn.Module) -> bool:
    """Return whether a layer computes what its class says, from a weight that is a parameter."""
    if "weight" not in dict(part.named_parameters(recurse=False)) or "forward" in vars(part):
        return False
    return not (isinstance(part, nn.Embedding) and (part.max_norm is not None or part.scale_grad_by_freq))


def _never_fast(parent: nn.Module) -> None:
    """Have a transformer's layer call its parts, where its short cut would take their float weights."""
    if isinstance(parent, nn.TransformerEncoderLayer):
        parent.activation_relu_or_gelu = 0


def _ternary(
    part: nn.Module,
    layer_class: type[BitLinear],
    quant_config: BitQuantConfig | Mapping[str, Any] | None,
    norm: bool,
) -> nn.Module:
    """Return a ternary layer with the parameters of a float one."""
    old: Any = part
    bias = getattr(old, "bias", None)
    with torch.device("meta"):  # its own weight is not needed
        if isinstance(part, nn.Linear):
            new: Any = layer_class(
                part.in_features, part.out_features, bias is not None, quant_config=quant_config
            )
        elif isinstance(part, nn.Conv2d):
            new = BitConv2d(
                part.in_channels,
                part.out_channels,
                cast("Any", part.kernel_size),
                cast("Any", part.stride),
                cast("Any", part.padding),
                cast("Any", part.dilation),
                part.groups,
                bias is not None,
                cast("Any", part.padding_mode),
                quant_config,
            )
        else:
            new = BitEmbedding(old.num_embeddings, old.embedding_dim, old.padding_idx, quant_config)
    new.weight = old.weight
    if bias is not None:
        new.bias = bias
    if norm and isinstance(part, nn.Linear):
        new.norm = SubLN(part.in_features, device=part.weight.device, dtype=part.weight.dtype)
    for name, held in vars(part).items():
        if "_hook" in name and name in vars(new):
            setattr(new, name, held)  # The same dictionary, from which handles remove their hooks.
    new.train(old.training)
    return new
