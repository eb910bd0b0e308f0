"""A training step on one CPU thread against Hugging Face's Llama of the same shape, at equal loss.

About 19M parameters, float32 weights, 4 rows of 512 tokens; a step is forward, loss, backward, clipping,
AdamW and zeroing. The peer is trained as its users do: its default attention and torch.optim.AdamW as it
comes. The loss part trains both from the same weights on the same text, the standard library's sources.

Run with ``make bench P=llm-trainer``.
"""

from __future__ import annotations

import os

# Before torch is loaded, or its thread pool is larger.
os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from llm_trainer.config import ModelConfig, TrainingConfig
from llm_trainer.models import TransformerLM
from llm_trainer.models._compile import compile_blocks_
from llm_trainer.models._flops import flops_per_token
from llm_trainer.tokenizer import BPETokenizer
from llm_trainer.training import create_optimizer, set_seed
from llm_trainer.training._precision import Precision
from llm_trainer.training._step import take_step
from measuring import environment, interleave, table, write_results
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = ModelConfig(
    vocab_size=16384, d_model=384, n_heads=6, n_layers=8, d_ff=1024, max_seq_len=512, dropout=0.0,
    attention_dropout=0.0, norm="rmsnorm", positions="rope", activation="swiglu", bias=False,
    zero_init_projections=False,
)  # fmt: skip
ROWS = 4
RATE, DECAY, CLIP = 1e-3, 0.01, 1.0
Step = Callable[[Tensor], float]


def llama_like(model: TransformerLM) -> LlamaForCausalLM:
    """Return Hugging Face's Llama with the same weights."""
    c = model.config
    peer = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff,
            num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, num_key_value_heads=c.kv_heads,
            max_position_embeddings=c.max_seq_len, rms_norm_eps=c.norm_eps, tie_word_embeddings=True,
        )
    )  # fmt: skip
    ours = model.state_dict()
    theirs = {
        "model.embed_tokens.weight": ours["embedding.weight"],
        "model.norm.weight": ours["final_norm.weight"],
    }
    for layer in range(c.n_layers):
        old, new = f"blocks.{layer}.", f"model.layers.{layer}."
        q, k, v = ours[old + "attention.qkv.weight"].chunk(3)
        gate, up = ours[old + "feed_forward.up.weight"].chunk(2)
        theirs |= {
            new + "self_attn.q_proj.weight": q,
            new + "self_attn.k_proj.weight": k,
            new + "self_attn.v_proj.weight": v,
            new + "self_attn.o_proj.weight": ours[old + "attention.out.weight"],
            new + "mlp.gate_proj.weight": gate,
            new + "mlp.up_proj.weight": up,
            new + "mlp.down_proj.weight": ours[old + "feed_forward.down.weight"],
            new + "input_layernorm.weight": ours[old + "attention_norm.weight"],
            new + "post_attention_layernorm.weight": ours[old + "feed_forward_norm.weight"],
        }
    missing, unexpected = peer.load_state_dict(theirs, strict=False)
    if missing != ["lm_head.weight"] or unexpected:
        raise RuntimeError(f"the architectures differ: missing {missing}, unexpected {unexpected}")
    return peer.train()


def peer_step(weights: TransformerLM, *, half: bool) -> Step:
    model = llama_like(weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)

    def step(ids: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def our_step(weights: TransformerLM, *, compiled: bool) -> Step:
    model = TransformerLM(CONFIG)
    model.load_state_dict(weights.state_dict())
    if compiled:
        compile_blocks_(model)
    optimizer = create_optimizer(model, learning_rate=RATE, weight_decay=DECAY)
    precision = Precision(TrainingConfig(amp_dtype="bfloat16"), torch.device("cpu"))

    def step(ids: Tensor) -> float:
        batch = {"input_ids": ids, "labels": ids}
        return take_step(model, [batch], optimizer, precision, torch.device("cpu"), CLIP).loss

    return step


def standard_library(steps: int) -> Tensor:
    """Return (steps, ROWS, T) tokens of the standard library's sources."""
    folder = Path(os.__file__).parent
    texts = [path.read_text("utf-8", "replace") for path in sorted(folder.glob("*.py"))]
    tokenizer = BPETokenizer()
    tokenizer.train(texts, vocab_size=CONFIG.vocab_size)
    ids = torch.tensor([token for text in texts for token in tokenizer.encode(text)])
    rows = ids[: len(ids) // CONFIG.max_seq_len * CONFIG.max_seq_len].view(-1, CONFIG.max_seq_len)
    order = torch.cat([torch.randperm(len(rows)) for _ in range(steps * ROWS // len(rows) + 1)])
    return rows[order[: steps * ROWS]].view(steps, ROWS, -1)


def matmul_peak() -> float:
    """Return the operations in a CPU second of large bfloat16 products, the best of several."""
    best = 0.0
    for size in (1024, 2048, 4096):
        a, b = (torch.randn(size, size, dtype=torch.bfloat16) for _ in range(2))
        for _ in range(6):
            start = time.process_time()
            a @ b
            best = max(best, 2 * size**3 / (time.process_time() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="rounds to take the median of (default 9)")
    parser.add_argument("--loss-steps", type=int, default=200, help="steps to compare losses after; 0: none")
    parser.add_argument("--json", type=Path, help="where to write the results (default: results/ beside it)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    set_seed(0)
    weights = TransformerLM(CONFIG)
    steps: dict[str, Step] = {
        "transformers, float32": peer_step(weights, half=False),
        "transformers, bfloat16 autocast": peer_step(weights, half=True),
        "llm-trainer, bfloat16": our_step(weights, compiled=False),
        "llm-trainer, bfloat16, compiled by block": our_step(weights, compiled=True),
    }
    start = time.perf_counter()
    ids = torch.randint(0, CONFIG.vocab_size, (ROWS, CONFIG.max_seq_len))
    for step in steps.values():
        step(ids)
    warm_s = time.perf_counter() - start
    timings = interleave(
        {name: lambda step=step: step(ids) for name, step in steps.items()}, rounds=arguments.rounds
    )
    peak = matmul_peak()
    flops = flops_per_token(CONFIG, CONFIG.max_seq_len) * ids.numel()
    first = timings["transformers, float32"].cpu_s
    second = timings["transformers, bfloat16 autocast"].cpu_s
    info = environment(["llm-trainer", "torch", "transformers"])
    print(f"{weights.get_num_params():,} parameters, {ids.numel()} tokens and {flops / 1e9:.0f} GFLOP a step")
    print(f"{info['processor']}, one thread: {' '.join(info['processor_flags'])}")
    print(f"bfloat16 products: at most {peak / 1e9:.0f} GFLOP a CPU second; first steps: {warm_s:.0f} s")
    print(table(
        ["", "CPU s a step", "wall s", "to float32", "to autocast", "of the bfloat16 peak"],
        [
            [
                name, f"{t.cpu_s:.3f}", f"{t.wall_s:.3f}", f"{first / t.cpu_s:.2f}x",
                f"{second / t.cpu_s:.2f}x", f"{flops / t.cpu_s / peak:.0%}",
            ]
            for name, t in timings.items()
        ],
    ))  # fmt: skip
    results: dict[str, object] = {
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "flops_a_step": flops,
        "peak_flops": peak,
        "environment": info,
    }
    if arguments.loss_steps:
        text = standard_library(arguments.loss_steps)
        losses: dict[str, list[float]] = {}
        fresh = {
            "transformers, float32": peer_step(weights, half=False),
            "llm-trainer, bfloat16, compiled by block": our_step(weights, compiled=True),
        }
        for name, step in fresh.items():
            losses[name] = [step(batch) for batch in text]
        last = {name: statistics.mean(values[-20:]) for name, values in losses.items()}
        theirs, ours = last.values()
        print(f"\nmean loss of the last 20 of {arguments.loss_steps} steps on real text:")
        print(table(["", "loss"], [[name, f"{loss:.4f}"] for name, loss in last.items()]))
        print(f"difference: {ours / theirs - 1:+.2%}")
        results["losses"] = losses
    print(f"written to {write_results(__file__, arguments.json, results)}")


if __name__ == "__main__":
    sys.exit(main())
