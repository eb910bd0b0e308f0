"""Models as they come in: what they are, how they are read, and how a worker process gets them."""

from hamerspace.models.info import Array, Feeds, ModelInfo, TensorSpec
from hamerspace.models.source import ModelSource

__all__ = ["Array", "Feeds", "ModelInfo", "ModelSource", "TensorSpec"]
