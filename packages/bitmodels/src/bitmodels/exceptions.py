"""The exceptions that bitmodels raises: bitlab-core's, and two of its own."""

from bitcore.exceptions import BitLabError, KernelNotFoundError, QuantizationError

__all__ = ["BitLabError", "CheckpointError", "KernelNotFoundError", "ModelNotFoundError", "QuantizationError"]


class ModelNotFoundError(BitLabError, KeyError):
    """No model is registered under this name, or for this configuration."""

    def __str__(self) -> str:
        """Return the message; a KeyError would put it in quotes."""
        return str(self.args[0]) if self.args else ""


class CheckpointError(BitLabError, ValueError):
    """A checkpoint is missing, damaged, or of a kind that cannot be read."""
