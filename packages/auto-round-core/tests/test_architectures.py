"""Each family of models quantised from its checkpoint, in memory, and read back by transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from auto_round import AutoRound
from auto_round.exceptions import QuantizationError
from auto_round.quantization._layers import find_layers
from auto_round.quantization._quantized import QuantizedWeight
from torch import Tensor, nn

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_BERT = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
LAYERS = {
    "llama": (*_ATTENTION, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "phi": (*_ATTENTION, "self_attn.dense", "mlp.fc1", "mlp.fc2"),
    "phi3": ("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    "opt": (*_ATTENTION, "self_attn.out_proj", "fc1", "fc2"),
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "mixtral": (*_ATTENTION, "self_attn.o_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    "bert": (*_BERT, "intermediate.dense", "output.dense"),
}
LIKE = dict.fromkeys(("llama-tied", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3"), "llama")
LIKE["qwen3-moe"] = "mixtral"
FAMILIES = [*LAYERS, *LIKE]
BLOCKS = {
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
    "bert": "bert.encoder.layer",
}
CONFIG: dict[str, Any] = {
    "quantization": {
        "bits": 3,
        "group_size": 32,
        "iters": 14,
        "nsamples": 6,
        "seqlen": 16,
        "batch_size": 4,
    }
}


def quantised(model: Any, ids: Tensor, config: dict[str, Any] = CONFIG) -> AutoRound:
    rounder = AutoRound(model, config=config, calibration=ids, progress=False)
    rounder.quantize()
    return rounder


def weights_of(rounder: AutoRound) -> dict[str, QuantizedWeight]:
    assert rounder._store is not None
    return {name: rounder._store.read(name) for name in rounder._store.layers}


def replaced_by_hand(model: Any, weights: dict[str, QuantizedWeight]) -> Any:
    """The float model with codes times scales in place of its weights, by a formula of this test's own."""
    with torch.no_grad():
        for layer in find_layers(model):
            if layer.name not in weights:
                continue
            weight = weights[layer.name]
            rows, width = weight.codes.shape
            groups = weight.codes.double().view(rows, weight.scale.shape[1], -1)
            middle = 2 ** (weight.settings.bits - 1)
            matrix = ((groups - middle) * weight.scale.double().unsqueeze(-1)).view(rows, width)
            stored = layer.weight
            stored.copy_((matrix.T if layer.transposed else matrix.view(stored.shape)).to(stored.dtype))
    return model


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    return model(ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_quantised_alike_from_its_folder_and_in_memory(
    family: str,
    random_model: Callable[..., Any],
    saved_model: Callable[[str], Path],
    calibration_ids: Tensor,
    tmp_path: Path,
) -> None:
    model = random_model(family)
    kind = type(model)
    with quantised(str(saved_model(family)), calibration_ids) as stored:
        blocks = BLOCKS.get(family, "model.layers")
        expected = [f"{blocks}.{at}.{name}" for at in range(2) for name in LAYERS[LIKE.get(family, family)]]
        report = stored.report
        assert sorted(layer.name for layer in report.layers) == sorted(expected)
        assert [layer.name for layer in report.layers] == list(stored.layers)
        for block in report.blocks:
            assert block.loss_before is not None
            assert block.loss_after is not None
            assert block.best_step is not None
            # What was kept was best on its batch, and the first step's batch is rounded to nearest.
            assert block.step_losses[0] == pytest.approx(1, rel=0.02)
            assert block.step_losses[block.best_step] == min(block.step_losses)
            # That is certain for batches alone, but in these models much is won over all samples too.
            assert 0 < block.loss_after < 0.8 * block.loss_before
        weights = weights_of(stored)
        with quantised(model, calibration_ids) as held:
            for name, other in weights_of(held).items():
                assert torch.equal(other.codes, weights[name].codes), name
                assert torch.equal(other.scale, weights[name].scale), name
        (folder,) = stored.save(tmp_path / "fake", "fake")
    found = logits_of(kind.from_pretrained(folder), calibration_ids)
    by_hand = replaced_by_hand(random_model(family), weights)
    assert torch.equal(found, logits_of(by_hand, calibration_ids))
    assert torch.equal(found, logits_of(model, calibration_ids))
    assert not torch.equal(found, logits_of(random_model(family), calibration_ids))


class Own(nn.Module):
    """Blocks of a kind that nobody knows: two layers, one inside another module, and a number beside x."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(96, 32)
        self.blocks = nn.ModuleList(OwnBlock() for _ in range(3))
        self.out = nn.Linear(32, 96)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, 0.5)
        return self.out(x)


class OwnBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.inner = nn.Sequential(nn.Tanh(), nn.Linear(64, 32, bias=False))

    def forward(self, x: Tensor, share: float) -> Tensor:
        return x + share * self.inner(self.first(x))


def test_a_module_of_ones_own(calibration_ids: Tensor, tmp_path: Path) -> None:
    model = Own()
    with quantised(model, calibration_ids) as rounder:
        assert list(rounder.layers) == [
            f"blocks.{at}.{name}" for at in range(3) for name in ("first", "inner.1")
        ]
        for block in rounder.report.blocks:
            assert block.loss_before is not None
            assert block.loss_after is not None
            assert block.loss_after < block.loss_before
        by_hand = replaced_by_hand(Own(), weights_of(rounder))
        (folder,) = rounder.save(tmp_path / "fake", "fake")
    assert (folder / "model.safetensors").exists()
    with torch.no_grad():
        assert torch.equal(model(calibration_ids), by_hand(calibration_ids))
        assert not torch.equal(model(calibration_ids), Own()(calibration_ids))


def test_a_model_without_blocks_is_refused_before_anything_is_read(calibration_ids: Tensor) -> None:
    model = nn.Sequential(nn.Embedding(96, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    with pytest.raises(QuantizationError, match="Sequential has no list of repeated blocks"):
        AutoRound(model, config=CONFIG, calibration=calibration_ids)
