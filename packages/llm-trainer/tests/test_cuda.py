"""Training on a GPU gives what training on the CPU gives, in each precision."""

import pytest
import torch
from llm_trainer.config import ModelConfig, TrainingConfig
from llm_trainer.data import LanguageModelingDataset
from llm_trainer.models import TransformerLM
from llm_trainer.tokenizer import BPETokenizer
from llm_trainer.training import Trainer, set_seed

pytestmark = pytest.mark.cuda

TEXTS = [f"the {animal} sat on the {place}. " * 8 for animal in ("cat", "dog") for place in ("mat", "bed")]


def train(device: str, **settings: object) -> tuple[Trainer, float]:
    tokenizer = BPETokenizer()
    tokenizer.train(TEXTS, vocab_size=300)
    dataset = LanguageModelingDataset(TEXTS, tokenizer, max_length=32)
    set_seed(0)
    model = TransformerLM(
        ModelConfig(
            vocab_size=tokenizer.vocab_size, d_model=64, n_heads=2, n_layers=2, d_ff=128, max_seq_len=32,
            dropout=0.0, attention_dropout=0.0, norm="rmsnorm", positions="rope", qk_norm=True,
        )
    )  # fmt: skip
    config = TrainingConfig(batch_size=4, learning_rate=3e-3, max_steps=60, warmup_steps=5, **settings)
    trainer = Trainer(model, tokenizer, config, dataset, dataset, device=device, show_progress=False)
    trainer.train()
    return trainer, trainer.evaluate()["loss"]


def test_float32_agrees_with_the_cpu():
    _, on_cpu = train("cpu", use_amp=False)
    _, on_gpu = train("cuda", use_amp=False)
    assert on_gpu == pytest.approx(on_cpu, rel=0.02)


@pytest.mark.parametrize("amp_dtype", ["float16", "bfloat16"])
def test_half_precision_learns_as_well(amp_dtype: str):
    trainer, loss = train("cuda", amp_dtype=amp_dtype)
    _, exact = train("cuda", use_amp=False)
    assert loss == pytest.approx(exact, rel=0.1)
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert trainer.model(torch.zeros(1, 4, dtype=torch.long, device="cuda")).logits.device.type == "cuda"


def test_generation_on_the_gpu_equals_the_cpus():
    trainer, _ = train("cuda", use_amp=False)
    prompt = torch.tensor([trainer.tokenizer.encode("the cat")])
    on_gpu = trainer.model.generate(prompt.cuda(), 24).cpu()
    on_cpu = trainer.model.cpu().generate(prompt, 24)
    assert torch.equal(on_gpu, on_cpu)
