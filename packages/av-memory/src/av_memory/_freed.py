"""The class that a freed tensor takes on; imported only where torch is loaded."""

from __future__ import annotations

from typing import Any, NoReturn

import torch


class FreedTensor(torch.Tensor):
    """A tensor whose storage was given back by ``clear_memory``: every use of it raises."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        name = getattr(func, "__name__", "an operation")
        raise RuntimeError(
            f"this tensor was freed by clear_memory and cannot be used any more ({name} was called on it); "
            "make it anew, or do not hand it to clear_memory while you need it"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return "<tensor freed by clear_memory>"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise RuntimeError("this tensor was freed by clear_memory and cannot be pickled")
