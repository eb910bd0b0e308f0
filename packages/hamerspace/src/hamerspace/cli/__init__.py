"""The command ``hamerspace``."""
