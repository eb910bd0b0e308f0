"""One definition of the unit in every name that ends in ``_mb``."""

BYTES_PER_MB = 2**20


def to_mb(size_bytes: float) -> float:
    """Convert bytes to MB of 2**20 bytes."""
    return size_bytes / BYTES_PER_MB
