"""Kill a training run at random moments, resume it, and compare it with one that nothing happened to.

Each round trains a small model to its end. On the way it is killed several times: after a random time, while
a checkpoint is being written, and while an old one is being removed; with SIGKILL, or now and then with
SIGTERM. Every next start resumes from the newest whole checkpoint. At the end the weights and the loss curve
must be, to the bit, those of the uninterrupted run. Run with ``make bench P=llm-trainer``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llm_trainer.config import ModelConfig, TrainingConfig
from llm_trainer.data import LanguageModelingDataset
from llm_trainer.models import TransformerLM
from llm_trainer.tokenizer import BPETokenizer
from llm_trainer.training import Trainer
from safetensors.torch import load_file

TEXTS = [f"{n} times {m} is {n * m}, and {n} plus {m} is {n + m}.\n" * 3 for n in range(12) for m in range(4)]
VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw, 2 workers": {"dataloader_num_workers": 2},
    "muon": {"optimizer": "muon"},
    "muon, 2 workers": {"optimizer": "muon", "dataloader_num_workers": 2},
}
STEPS = 60
MOMENTS = ("any time", "while saving", "while rotating")


@dataclass
class Setting:
    tokenizer: BPETokenizer
    train: LanguageModelingDataset
    held_out: LanguageModelingDataset


def prepare() -> Setting:
    tokenizer = BPETokenizer()
    tokenizer.train(TEXTS, vocab_size=300)
    return Setting(
        tokenizer,
        LanguageModelingDataset(TEXTS[:-8], tokenizer, max_length=48),
        LanguageModelingDataset(TEXTS[-8:], tokenizer, max_length=48),
    )


def train(setting: Setting, folder: Path, changes: dict[str, Any]) -> None:
    """Train to the end, from the newest checkpoint in the folder if there is one."""
    torch.manual_seed(3)
    model = TransformerLM(
        ModelConfig(
            vocab_size=setting.tokenizer.vocab_size,
            d_model=32,
            n_heads=2,
            n_layers=2,
            d_ff=64,
            max_seq_len=48,
            norm="rmsnorm",
            positions="rope",
        )
    )
    config = TrainingConfig(
        batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        max_steps=STEPS,
        logging_steps=2,
        eval_steps=10,
        save_steps=3,
        save_total_limit=2,
        amp_dtype="bfloat16",
        checkpoint_dir=str(folder),
        report_to=("csv",),
        resume_from_checkpoint="latest",
        **changes,
    )
    Trainer(
        model, setting.tokenizer, config, setting.train, setting.held_out, device="cpu", show_progress=False
    ).train()


def outcome(folder: Path) -> tuple[str, str]:
    """The hash of the final weights, and that of the loss curve without its times."""
    weights = hashlib.sha256()
    # Not the file's own bytes: safetensors writes its metadata in any order.
    for name, tensor in sorted(load_file(folder / f"checkpoint-{STEPS}" / "model.safetensors").items()):
        weights.update(name.encode() + tensor.numpy().tobytes())
    names = ("step", "tokens", "train_loss", "eval_loss", "lr", "grad_norm", "skipped_steps", "epoch")
    records = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()[1:]]
    curve = json.dumps([[record[name] for name in names] for record in records])
    return weights.hexdigest(), hashlib.sha256(curve.encode()).hexdigest()


def start(setting: Setting, folder: Path, changes: dict[str, Any]) -> int:
    """Train in a process of its own; forked, for importing torch takes longer than this training."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        logging.disable(logging.CRITICAL)
        train(setting, folder, changes)
        code = 0
    except SystemExit as ended:
        code = int(str(ended.code))
    except BaseException:  # noqa: BLE001 - a forked process must not go on into what its parent was doing
        traceback.print_exc()
    finally:
        os._exit(code)


def wait_for(child: int, moment: str, folder: Path, seconds: float) -> int | None:
    """Wait until it is the moment; return the exit status if the process ends before."""
    mark = {"while saving": ".tmp", "while rotating": ".old"}.get(moment)
    earliest = time.monotonic() + seconds
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        if time.monotonic() < earliest:
            time.sleep(0.001)
        elif mark is None or (folder.is_dir() and any(path.name.endswith(mark) for path in folder.iterdir())):
            return None


def survive(
    setting: Setting, folder: Path, changes: dict[str, Any], dice: random.Random, kills: int
) -> Counter[str]:
    """Train to the end against all odds; return how often it was killed when."""
    killed: Counter[str] = Counter()
    for attempt in range(1, 200):
        child = start(setting, folder, changes)
        # After some kills the run is let go to its end.
        moment = dice.choice(MOMENTS) if attempt <= kills else "never"
        if moment == "never":
            _, status = os.waitpid(child, 0)
        else:
            ended = wait_for(child, moment, folder, dice.uniform(0.05, 0.8))
            if ended is None:
                number = signal.SIGTERM if moment == "any time" and dice.random() < 0.4 else signal.SIGKILL
                # A moment into the save or removal that was seen to begin.
                time.sleep(dice.uniform(0, 0.004))
                os.kill(child, number)
                _, status = os.waitpid(child, 0)
                killed[f"{moment}, {number.name}"] += 1
            else:
                status = ended
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            return killed
        if code not in {-signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM}:
            raise SystemExit(f"a start ended with {code} in {folder}")
    raise SystemExit("the run never came to its end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50, help="runs to kill and resume (default 50)")
    parser.add_argument("--kills", type=int, default=5, help="kills in a run, at most (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which they are killed")
    parser.add_argument("--json", type=Path, help="where to write the results (default: results/ beside it)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    setting = prepare()
    dice = random.Random(arguments.seed)
    killed: Counter[str] = Counter()
    different = 0
    with tempfile.TemporaryDirectory() as temporary:
        expected: dict[str, tuple[str, str]] = {}
        for number in range(arguments.rounds):
            name = list(VARIANTS)[number % len(VARIANTS)]
            if name not in expected:
                whole = Path(temporary) / f"whole {name}"
                _, status = os.waitpid(start(setting, whole, VARIANTS[name]), 0)
                if status:
                    raise SystemExit(f"the uninterrupted run ended with {status}")
                expected[name] = outcome(whole)
            folder = Path(temporary) / f"run {number}"
            kills = survive(setting, folder, VARIANTS[name], dice, arguments.kills)
            killed += kills
            same = outcome(folder) == expected[name]
            different += not same
            print(f"round {number + 1}: {name}: killed {kills.total()} times; "
                  f"{'the same to the bit' if same else 'DIFFERENT'}", flush=True)  # fmt: skip
    print(f"\n{arguments.rounds} runs, {killed.total()} kills, {different} results that differ")
    for moment, count in sorted(killed.items()):
        print(f"- {moment}: {count}")
    target = arguments.json or Path(__file__).parent / "results/bench_survival.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(
        json.dumps({"rounds": arguments.rounds, "kills": dict(killed), "different": different}) + "\n"
    )
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
