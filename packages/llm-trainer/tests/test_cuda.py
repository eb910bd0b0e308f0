"""Training on a GPU gives what training on the CPU gives, in each precision, compiled or not, and resumed."""

import signal

import pytest
import torch
from llm_trainer.config import ModelConfig, TrainingConfig
from llm_trainer.data import LanguageModelingDataset
from llm_trainer.models import TransformerLM
from llm_trainer.tokenizer import BPETokenizer
from llm_trainer.training import Callback, Trainer, create_optimizer, set_seed
from torch.nn.attention import SDPBackend, sdpa_kernel

pytestmark = pytest.mark.cuda

TEXTS = [f"the {animal} sat on the {place}. " * 8 for animal in ("cat", "dog") for place in ("mat", "bed")]


def train(device: str, callbacks=(), resume=None, **settings: object) -> tuple[Trainer, float]:
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
    defaults = {"checkpoint_dir": None, "report_to": (), "warmup_steps": 5, "max_steps": 60}
    config = TrainingConfig(batch_size=4, learning_rate=3e-3, **(defaults | settings))
    trainer = Trainer(
        model, tokenizer, config, dataset, dataset, callbacks, device=device, show_progress=False
    )
    trainer.train(resume)
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


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "muon"])
def test_each_optimizer_takes_the_step_that_it_takes_on_the_cpu(optimizer: str):
    torch.manual_seed(0)
    models = [torch.nn.Linear(8, 6).to(device) for device in ("cpu", "cuda")]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(5, 8)
    for model in models:
        chosen = create_optimizer(model, optimizer, learning_rate=0.01)
        fused = chosen.parts["adamw"] if optimizer == "muon" else chosen
        assert all(group["fused"] for group in fused.param_groups)
        for _ in range(3):
            chosen.zero_grad()
            model(x.to(model.weight.device)).square().sum().backward()
            chosen.step()
    # Muon's iteration is in bfloat16.
    tolerance = 0.02 if optimizer == "muon" else 1e-5
    torch.testing.assert_close(models[1].weight.cpu(), models[0].weight, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("amp_dtype", ["float16", "bfloat16"])
def test_compiled_blocks_learn_as_well(amp_dtype: str):
    _, eager = train("cuda", amp_dtype=amp_dtype)
    _, compiled = train("cuda", amp_dtype=amp_dtype, compile_model=True)
    assert compiled == pytest.approx(eager, rel=0.1)


def test_flash_attention_takes_rows_of_one_document_and_agrees():
    trainer, _ = train("cuda", amp_dtype="bfloat16")
    ids = torch.randint(0, 200, (2, 32), device="cuda")
    model = trainer.model.bfloat16().eval()
    with torch.no_grad():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            flash = model(ids).logits
        with sdpa_kernel(SDPBackend.MATH):
            plain = model(ids).logits
    torch.testing.assert_close(flash, plain, rtol=0.05, atol=0.1)


def test_documents_of_a_row_do_not_see_one_another():
    trainer, _ = train("cuda", use_amp=False)
    ids = torch.randint(0, 200, (1, 32), device="cuda")
    mask = torch.ones_like(ids)
    mask[:, 13:] = 2
    changed = ids.clone()
    changed[:, :13] = (ids[:, :13] + 1) % 200
    before, after = (trainer.model(x, attention_mask=mask).logits[:, 13:] for x in (ids, changed))
    torch.testing.assert_close(before, after, rtol=0, atol=0)


class Terminate(Callback):
    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step == 7 and not trainer.resumed_after:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("amp_dtype", ["float16", "bfloat16"])
def test_a_resumed_run_goes_on_alike(amp_dtype: str, tmp_path):
    settings = {"amp_dtype": amp_dtype, "max_steps": 14, "logging_steps": 1}
    whole, loss = train("cuda", **settings)
    settings["checkpoint_dir"] = str(tmp_path)
    with pytest.raises(SystemExit):
        train("cuda", [Terminate()], **settings)
    resumed, resumed_loss = train("cuda", [Terminate()], "latest", **settings)
    assert [r.train_loss for r in resumed.history] == pytest.approx(
        [r.train_loss for r in whole.history], rel=1e-3
    )
    assert resumed_loss == pytest.approx(loss, rel=1e-3)


def test_the_share_of_the_peak_is_known():
    trainer, _ = train("cuda", amp_dtype="bfloat16")
    assert 0 < trainer.history.records[-1].mfu < 1
