"""Models as they come in: what they are, how they are read, and how a worker process gets them."""

from hamerspace.models.info import ModelInfo, TensorSpec
from hamerspace.models.source import ModelSource

__all__ = ["ModelInfo", "ModelSource", "TensorSpec"]
