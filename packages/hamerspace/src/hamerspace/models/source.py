"""Where a model comes from, and how another process gets it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hamerspace.exceptions import ModelError
from hamerspace.models.info import Framework, ModelInfo

_MODULES: dict[Framework, str] = {
    "pytorch": "hamerspace.models.pytorch",
    "tensorflow": "hamerspace.models.tensorflow",
    "onnx": "hamerspace.models.onnx",
}


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model before it is optimised: a live object, or files that it can be read from.

    Each framework has a module in `hamerspace.models` with ``load(source)``, ``stage(source, folder)`` and
    ``original(source, options)``, the last of which gives a `Runner` of the model as it is.
    """

    info: ModelInfo
    model: Any = None
    """The live object, if there is one."""
    path: Path | None = None
    staged: bool = False
    """Whether `path` was written by `stage` for a process of ours."""

    @classmethod
    def of(cls, model: Any, info: ModelInfo | None = None, input_shape: Any = None) -> ModelSource:
        """Take a model of torch, Keras or ONNX, a path to one, or a source.

        Args:
            model: what is taken.
            info: what is known of it; a path is read for the inputs that it has there.
            input_shape: of a path of which nothing is known.

        Raises:
            ModelError: it is a live model and ``info`` is missing, or no model at all.
        """
        if isinstance(model, ModelSource):
            return model
        if isinstance(model, (str, Path)):
            from hamerspace.models.reading import read_as, read_path

            path = Path(model)
            return read_path(path, input_shape=input_shape) if info is None else read_as(path, info)
        if info is None:
            raise ModelError(
                "a live model needs its ModelInfo; hamerspace.Optimizer.from_pytorch(model, input_shape) "
                "finds it out, as its attribute model_info"
            )
        return cls(info=info, model=model)

    def load(self) -> Any:
        """Return the live model, in evaluation mode; it may be the caller's own and is not to be changed."""
        return self.model if self.model is not None else self._module().load(self)

    def stage(self, folder: Path) -> ModelSource:
        """Return a source that another process can load, with what it needs written into ``folder``."""
        if self.model is None and self.path is not None:
            return self
        return replace(self, model=None, path=self._module().stage(self, folder), staged=True)

    def original(self, options: Any) -> Any:
        """Return a `hamerspace.runtimes.Runner` of the model as it came in."""
        return self._module().original(self, options)

    def _module(self) -> Any:
        return importlib.import_module(_MODULES[self.info.framework])
