"""What auto-round-core raises of its own."""

__all__ = [
    "AutoRoundError",
    "CalibrationError",
    "CheckpointError",
    "ConfigurationError",
    "ExportError",
    "MissingPackageError",
    "QuantizationError",
    "UnsafeFileError",
    "UnsafeLoadWarning",
]


class AutoRoundError(Exception):
    """Base of every exception of this package."""


class ConfigurationError(AutoRoundError, ValueError):
    """A setting is unknown, out of range, or contradicts another."""


class CalibrationError(AutoRoundError, ValueError):
    """Calibration data is missing, cannot be read, is too short, or is not what the model takes."""


class CheckpointError(AutoRoundError, RuntimeError):
    """A checkpoint is missing a part, is damaged, or holds what may not be loaded."""


class QuantizationError(AutoRoundError, ValueError):
    """Numbers cannot be had in a format: they are not finite, beyond its range, or of a wrong form."""


class ExportError(AutoRoundError, OSError):
    """A model, or what is kept until then, cannot be written: the disk is full, the folder is taken."""


class MissingPackageError(AutoRoundError, ImportError):
    """A library that is needed only for what was asked is not installed; the message says how to get it."""


class UnsafeFileError(CheckpointError):
    """A file asks for code to be run, or for more than tensors and plain containers; nothing was run."""


class UnsafeLoadWarning(UserWarning):
    """A file is read with `allow_unsafe=True`, so whatever code it names is run."""
