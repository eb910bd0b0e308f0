"""Layouts of ternary codes at 2 bits and less, one module each.

Each module has `pack(codes)`, which takes int8 of -1, 0 and 1, [rows, columns], and `unpack(packed, ...)`,
which returns them.

- `tiles`: what the kernels compute on.
- `rows`: plain rows, four codes in a byte.
- `hf_bitnet`: what Hugging Face checkpoints of BitNet hold.
- `gguf_ternary`: GGUF's TQ1_0 and TQ2_0.
- `gguf_i2_s`: the I2_S of bitnet.cpp.
"""

from bitcore.packing import gguf_i2_s, gguf_ternary, hf_bitnet, rows, tiles

__all__ = ["gguf_i2_s", "gguf_ternary", "hf_bitnet", "rows", "tiles"]
