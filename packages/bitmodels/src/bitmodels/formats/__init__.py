"""How models are stored, one module each.

- `native`: any registered model, as `save_pretrained` writes it.
- `huggingface`: BitNet checkpoints of the Hugging Face layout.
- `gguf`: what llama.cpp and bitnet.cpp run.
"""
