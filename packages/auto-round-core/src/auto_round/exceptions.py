"""What auto-round-core raises of its own."""

__all__ = ["AutoRoundError", "CheckpointError", "ConfigurationError"]


class AutoRoundError(Exception):
    """Base of every exception of this package."""


class ConfigurationError(AutoRoundError, ValueError):
    """A setting is unknown, out of range, or contradicts another."""


class CheckpointError(AutoRoundError, RuntimeError):
    """A checkpoint is missing a part, is damaged, or holds what may not be loaded."""
