"""A model is trained from raw text under av-memory's tracker, as installed from wheels."""

import importlib.metadata
import json
import sysconfig
from pathlib import Path

import av_memory
import pytest
import torch
from llm_trainer.config import ModelConfig, TrainingConfig
from llm_trainer.data import LanguageModelingDataset
from llm_trainer.models import TransformerLM
from llm_trainer.tokenizer import BPETokenizer
from llm_trainer.training import Trainer

MEMBERS = {
    "av-memory": "av_memory",
    "auto-round-core": "auto_round",
    "bitlab-core": "bitcore",
    "bitlayers": "bitlayers",
    "bitmodels": "bitmodels",
    "hamerspace": "hamerspace",
    "llm-trainer": "llm_trainer",
}


@pytest.mark.parametrize(("distribution", "module"), MEMBERS.items())
def test_every_member_is_installed_from_a_wheel_and_not_from_the_checkout(distribution: str, module: str):
    found = importlib.metadata.distribution(distribution)
    checkout = Path(__file__).resolve().parents[1] / "packages"
    imported = __import__(module)
    assert not Path(imported.__file__).is_relative_to(checkout)
    assert imported.__version__ == found.version
    assert json.loads(found.read_text("direct_url.json") or "{}").get("dir_info") is None


def test_training_is_tracked_and_the_peaks_agree_with_the_system(tmp_path: Path):
    torch.set_num_threads(1)
    library = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text(encoding="utf-8") for path in sorted(library.glob("a*.py"))]
    tokenizer = BPETokenizer()
    tokenizer.train(texts, vocab_size=512)
    dataset = LanguageModelingDataset(texts, tokenizer, max_length=64)
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        d_model=64,
        n_heads=2,
        n_layers=2,
        d_ff=128,
        max_seq_len=64,
        dropout=0.0,
    )
    trainer = Trainer(
        TransformerLM(config),
        tokenizer,
        TrainingConfig(
            batch_size=8,
            learning_rate=3e-3,
            max_steps=160,
            logging_steps=10,
            checkpoint_dir=str(tmp_path / "checkpoints"),
        ),
        train_dataset=dataset,
        eval_dataset=torch.utils.data.Subset(dataset, range(32)),
        show_progress=False,
    )
    trained = av_memory.get_memory_stats().scopes.get("train")
    runs = 0 if trained is None else trained.count
    before = trainer.evaluate()["loss"]
    with av_memory.MemoryTracker("whole run") as tracker:
        trainer.train()
    after = trainer.evaluate()["loss"]
    assert after < before - 1

    trainer.save_model(tmp_path / "model")
    loaded = Trainer.from_pretrained(
        tmp_path / "model", config=trainer.config, eval_dataset=trainer.eval_dataset
    )
    assert loaded.evaluate()["loss"] == pytest.approx(after, rel=1e-4)

    stats = av_memory.get_memory_stats()
    assert stats.scopes["train"].count == runs + 1
    assert stats.scopes["evaluate"].count >= 3
    status = Path("/proc/self/status").read_text().splitlines()
    (kernel_kb,) = [int(line.split()[1]) for line in status if line.startswith("VmHWM")]
    assert tracker.result.cpu.peak_mb <= 1.02 * kernel_kb / 1024
    assert stats.peak_cpu_mb == pytest.approx(kernel_kb / 1024, rel=0.02)

    page = tmp_path / "report.html"
    av_memory.save_report(page)
    text = page.read_text(encoding="utf-8")
    assert "whole run" in text
    assert "evaluate" in text

    weights = [parameter.nbytes for parameter in loaded.model.parameters()]
    model = loaded.model
    del loaded, trainer
    release = av_memory.clear_memory(model)
    assert release.freed_bytes >= sum(weights)
