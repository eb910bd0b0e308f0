"""Ternary quantisation, its kernels and their registry.

Parts: `bitcore.config` (BitQuantConfig), `bitcore.ops` (quantisation and the linear layer as functions),
`bitcore.kernels` (what computes on packed weights), `bitcore.packing` (layouts of packed weights) and
`bitcore.exceptions`.
"""

__version__ = "0.1.0"

__all__: list[str] = []
