"""The model, the calibration windows and the evaluation text that the benchmarks share.

A Llama of 6.6M parameters is trained here on the standard library's sources and, for prose, on WikiText-2
(``AV_DATA``/wikitext-2), long enough that two bits hurt it. Text is dealt into training, calibration and
evaluation by the hash of whole files and articles, so none of the three holds a line of another's. All of it
is kept in a work folder under a name made of the recipe and of the text; a second call reads it back.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

RECIPE: Final[dict[str, Any]] = {
    "model": {
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    },
    "steps": 2200,
    "batch": 8,
    "muon_learning_rate": 0.02,
    "adamw_learning_rate": 1e-2,
    "betas": (0.9, 0.95),
    "weight_decay": 0.01,
    "warmup": 40,
    "clip_norm": 1.0,
    "prose_repeats": 2,
    "held_out_code": 0.05,
    "held_out_prose": 0.16,
    "seed": 0,
}
WINDOW: Final = 256
CALIBRATION_SAMPLES: Final = 128
SEEDS: Final = (0, 1, 2)
KINDS: Final = ("code", "prose")
EVALUATION_WINDOWS: Final = 400
END: Final = "<|end|>"


def default_work() -> Path:
    """``$XDG_CACHE_HOME/auto-round-bench``, or the same under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "auto-round-bench"


def data_folder(given: Path | None) -> Path:
    """The folder that holds ``wikitext-2``: the option, else ``AV_DATA``."""
    folder = given or Path(os.environ.get("AV_DATA", ""))
    if not (folder / "wikitext-2" / "valid.txt").is_file():
        raise SystemExit(f"no wikitext-2/valid.txt in {str(folder)!r}; name its folder by --data or AV_DATA")
    return folder


def library_sources() -> list[str]:
    """The standard library's sources and tests, without installed packages and generated tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: list[str] = []
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages", "encodings", "pydoc_data"} & set(path.relative_to(root).parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            texts.append(text)
    return texts


def articles(text: str) -> list[str]:
    """WikiText split at its top headings, `` = Title = ``."""
    starts = [match.start() for match in re.finditer(r"^ = [^=].*[^=] = \n", text, flags=re.MULTILINE)]
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def deal(texts: list[str], share: float) -> dict[str, list[str]]:
    """Whole texts in the order of their hashes: a share to evaluate, another to calibrate, the rest to train.

    A text that comes twice stays together with its copy, since both have one hash.
    """
    ordered = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    limit = share * sum(map(len, texts))
    parts: dict[str, list[str]] = {"evaluation": [], "calibration": [], "train": []}
    names, taken, last = ["evaluation", "calibration", "train"], 0, ""
    for text in ordered:
        if taken >= limit and len(names) > 1 and text != last:
            names.pop(0)
            taken = 0
        parts[names[0]].append(text)
        taken, last = taken + len(text), text
    return parts


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE, so that any text has tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def windows(tokenizer: Tokenizer, texts: list[str], generator: torch.Generator) -> torch.Tensor:
    """Non-overlapping windows, int64 ``[windows, 256]``, of the texts one after another, in random order."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.token_to_id(END)]
    count = len(ids) // WINDOW
    rows = torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)
    return rows[torch.randperm(count, generator=generator)]


def learning_rate_factor(step: int, recipe: dict[str, Any]) -> float:
    """Of the peak: a linear warm-up, then a cosine down to a hundredth."""
    if step < recipe["warmup"]:
        return (step + 1) / recipe["warmup"]
    progress = (step - recipe["warmup"]) / max(1, recipe["steps"] - recipe["warmup"])
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def batches(rows: torch.Tensor, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Epochs without end, each in an order of its own."""
    while True:
        for index in torch.randperm(len(rows), generator=generator).split(size):
            if len(index) == size:
                yield rows[index]


def train(rows: torch.Tensor, recipe: dict[str, Any]) -> Any:
    """Muon for the matrices of the blocks and AdamW for the rest, fp32 with bf16 products, one thread.

    AdamW alone took three times as many steps to the same loss here, more than a benchmark can wait for.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe["seed"])
    model = LlamaForCausalLM(LlamaConfig(**recipe["model"], bos_token_id=0, eos_token_id=0)).train()
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in named if p.ndim != 2 or ".layers." not in name]
    optimizers = (
        torch.optim.Muon(
            matrices, lr=recipe["muon_learning_rate"], momentum=0.95, weight_decay=recipe["weight_decay"]
        ),
        torch.optim.AdamW(others, lr=recipe["adamw_learning_rate"], betas=recipe["betas"], weight_decay=0.0),
    )
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, recipe))
        for optimizer in optimizers
    ]
    source = batches(rows, recipe["batch"], torch.Generator().manual_seed(recipe["seed"]))
    began, recent = time.process_time(), 0.0
    for step in range(recipe["steps"]):
        batch = next(source)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip_norm"])
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        recent += float(loss.detach())
        if (step + 1) % 100 == 0:
            spent = time.process_time() - began
            print(f"step {step + 1}: loss {recent / 100:.3f}, {spent:.0f} CPU s", flush=True)
            recent = 0.0
    return model.eval()


def prepare(work: Path, data: Path) -> Path:
    """The folder of the trained model, made at the first call.

    It holds a Hugging Face checkpoint in fp32 with its tokenizer, and ``windows.safetensors``: int64 tensors
    ``calibration.<kind>.<seed>`` ``[128, 256]`` and ``evaluation.<kind>`` ``[400, 256]``. The windows of one
    kind's three seeds do not overlap.
    """
    prose = [
        article
        for name in ("valid.txt", "test.txt")
        for article in articles((data / "wikitext-2" / name).read_text(encoding="utf-8"))
    ]
    code = library_sources()
    digest = hashlib.sha256(json.dumps(RECIPE, sort_keys=True).encode())
    for text in (*code, *prose):
        digest.update(hashlib.sha256(text.encode()).digest())
    folder = work / f"small-llama-{digest.hexdigest()[:12]}"
    if (folder / "recipe.json").is_file():
        return folder

    from transformers import PreTrainedTokenizerFast

    torch.set_num_threads(1)
    parts = {"code": deal(code, RECIPE["held_out_code"]), "prose": deal(prose, RECIPE["held_out_prose"])}
    tokenizer = train_tokenizer(parts["code"]["train"], RECIPE["model"]["vocab_size"])
    generator = torch.Generator().manual_seed(RECIPE["seed"])
    stored: dict[str, torch.Tensor] = {}
    for kind in KINDS:
        held = windows(tokenizer, parts[kind]["evaluation"], generator)
        samples = windows(tokenizer, parts[kind]["calibration"], generator)
        wanted = CALIBRATION_SAMPLES * len(SEEDS)
        if len(held) < EVALUATION_WINDOWS or len(samples) < wanted:
            raise SystemExit(
                f"{kind}: {len(held)} windows to evaluate ({EVALUATION_WINDOWS} wanted) and {len(samples)} "
                f"to calibrate ({wanted} wanted); give more text or hold out more of it"
            )
        stored[f"evaluation.{kind}"] = held[:EVALUATION_WINDOWS].contiguous()
        for seed in SEEDS:
            first = CALIBRATION_SAMPLES * seed
            stored[f"calibration.{kind}.{seed}"] = samples[first : first + CALIBRATION_SAMPLES].contiguous()
    rows = torch.cat(
        [
            windows(tokenizer, parts["code"]["train"], generator),
            *[windows(tokenizer, parts["prose"]["train"], generator)] * RECIPE["prose_repeats"],
        ]
    )
    print(f"training on {rows.numel():,} tokens", flush=True)
    began = time.process_time()
    model = train(rows, RECIPE)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)
    save_file(stored, folder / "windows.safetensors")
    facts = {
        "recipe": RECIPE,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": rows.numel(),
        "trained_tokens": RECIPE["steps"] * RECIPE["batch"] * WINDOW,
        "training_cpu_s": time.process_time() - began,
    }
    # Written last: a folder without it is one whose making was cut short.
    (folder / "recipe.json").write_text(json.dumps(facts, indent=1) + "\n")
    return folder


def read_windows(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that ``prepare`` stored beside the model."""
    return load_file(folder / "windows.safetensors")
