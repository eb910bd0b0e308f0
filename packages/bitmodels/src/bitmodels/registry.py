"""Which models there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from bitcore.exceptions import nearest

from bitmodels.exceptions import ModelNotFoundError

if TYPE_CHECKING:
    from bitmodels.base import BitModelBase

__all__ = ["MODEL_REGISTRY", "register_model"]

_Model = TypeVar("_Model", bound="BitModelBase")


class _Registry(dict[str, "type[BitModelBase]"]):
    """Models by name; asked for a name that is unknown, it says which are known."""

    def __missing__(self, name: str) -> type[BitModelBase]:
        known = ", ".join(self)
        raise ModelNotFoundError(f"there is no model {name!r} among {known}{nearest(name, self)}")


MODEL_REGISTRY: dict[str, type[BitModelBase]] = _Registry()
"""Model classes by the names that they were registered under."""


def register_model(name: str) -> Callable[[type[_Model]], type[_Model]]:
    """Return a decorator that registers a model's class, so that `AutoBitModel` and checkpoints find it.

    Args:
        name: Written into checkpoints. A class that is registered under a name that is taken replaces the
            other.

    Raises:
        TypeError: What is decorated is no `BitModelBase`.
    """

    def register(model: type[_Model]) -> type[_Model]:
        from bitmodels.base import BitModelBase

        if not issubclass(model, BitModelBase):
            raise TypeError(f"{model.__name__} is no BitModelBase, so it cannot be registered as {name!r}.")
        model.registered_name = name
        MODEL_REGISTRY[name] = model
        return model

    return register
