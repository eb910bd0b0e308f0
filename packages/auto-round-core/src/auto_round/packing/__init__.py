"""Packing: how the codes of quantised weights lie in words and bytes."""
