"""Utilities: the package's logger."""

from hamerspace.utils.logger import get_logger, set_log_level

__all__ = ["get_logger", "set_log_level"]
