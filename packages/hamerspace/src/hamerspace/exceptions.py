"""What hamerspace raises of its own; each is also the standard exception that callers expect."""

__all__ = ["BackendError", "ConstraintError", "HamerspaceError", "UnsupportedError"]


class HamerspaceError(Exception):
    """Base of every exception of this package."""


class ConstraintError(HamerspaceError, ValueError):
    """A constraint or parameter is out of range or contradicts another."""


class BackendError(HamerspaceError, RuntimeError):
    """A backend is not there, or failed at what was asked of it."""


class UnsupportedError(HamerspaceError, NotImplementedError):
    """No backend can do this to this kind of model."""
