"""What hamerspace raises of its own; each is also the standard exception that callers expect."""

__all__ = [
    "ArtifactError",
    "BackendError",
    "BackendUnavailableError",
    "ConstraintError",
    "HamerspaceError",
    "ModelError",
    "ModelInputError",
    "ModelNotFoundError",
    "UnsafeModelError",
    "UnsupportedError",
    "WorkerError",
]


class HamerspaceError(Exception):
    """Base of every exception of this package."""


class ConstraintError(HamerspaceError, ValueError):
    """A constraint or parameter is out of range or contradicts another."""


class ModelError(HamerspaceError, ValueError):
    """A file holds no model that can be read, or a model cannot be described."""


class UnsafeModelError(ModelError):
    """A file would execute code when it is read, and the caller has not allowed that."""


class ModelNotFoundError(HamerspaceError, FileNotFoundError):
    """There is no such model file."""


class ModelInputError(HamerspaceError, ValueError):
    """Inputs, or calibration data, do not fit the model."""


class ArtifactError(HamerspaceError, ValueError):
    """A saved model is damaged, or written by a newer version."""


class BackendError(HamerspaceError, RuntimeError):
    """A backend failed at what was asked of it."""


class BackendUnavailableError(BackendError, ImportError):
    """A backend's libraries are not installed; the message says what installs them."""


class WorkerError(BackendError):
    """A worker process failed, crashed, took too long, or took too much memory."""


class UnsupportedError(HamerspaceError, NotImplementedError):
    """No backend can do this to this kind of model."""


def first_line(error: BaseException | None) -> str:
    """Return the first line of what an exception says, or its class where it says nothing."""
    lines = str(error or "").strip().splitlines()
    return lines[0] if lines else type(error).__name__
