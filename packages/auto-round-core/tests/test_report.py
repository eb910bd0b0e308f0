"""The report as a value: figures against formulas, and JSON."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from auto_round.config_manager import LayerSettings
from auto_round.quantization import BlockReport, LayerReport, QuantizationReport
from auto_round.quantization._report import EndToEndReport, layer_report
from auto_round.quantization._rtn import quantize_rtn

INT4 = LayerSettings(bits=4, group_size=32, symmetric=True, weight_dtype="int")


def layer(name: str, weights: int, bits: float, sqnr: float = 20.0) -> LayerReport:
    figures = {"weights": weights, "sqnr_db": sqnr, "loss": 0.25, "stored_bits": bits}
    return LayerReport(name=name, settings=INT4, **figures)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_signal_to_noise_is_that_of_numpy(dtype: torch.dtype) -> None:
    # More rows than are compared at once.
    weight = torch.randn(20000, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    quantised = quantize_rtn(weight, INT4, torch.float16)
    report = layer_report("a", weight, quantised)
    w, q = weight.double().numpy(), quantised.dequantize().double().numpy()
    assert report.sqnr_db == pytest.approx(10 * np.log10((w**2).sum() / ((w - q) ** 2).sum()), rel=1e-9)
    assert report.loss == pytest.approx(((w - q) ** 2).mean(), rel=1e-9)
    assert (report.name, report.settings, report.weights) == ("a", INT4, 20000 * 64)


def test_weights_that_lose_nothing_and_weights_of_zeros() -> None:
    zeros = torch.zeros(2, 32)
    assert layer_report("a", zeros, quantize_rtn(zeros, INT4, torch.float16)).sqnr_db == math.inf
    exact = torch.arange(-8.0, 8).repeat(2, 2)
    assert layer_report("a", exact, quantize_rtn(exact, INT4, torch.float16)).sqnr_db == math.inf


def test_stored_bits_count_scales_and_zero_points() -> None:
    weight = torch.randn(8, 64)

    def bits(weight_dtype: str = "int", **other: object) -> float:
        given = {"bits": 4, "group_size": 32, "symmetric": True, **other}
        settings = LayerSettings(weight_dtype=weight_dtype, **given)
        scale_dtype = torch.float16
        return layer_report("a", weight, quantize_rtn(weight, settings, scale_dtype)).stored_bits

    assert bits() == 4 + 16 / 32
    assert bits(bits=3, symmetric=False) == 3 + 16 / 32 + 3 / 32
    assert bits(bits=2, group_size=-1) == 2 + 16 / 64
    assert bits("mxfp4") == 4 + 8 / 32
    assert bits("nvfp4", group_size=16) == 4 + 8 / 16
    assert bits("fp8", bits=8, group_size=-1) == 8 + 32 / 64


def test_the_average_weighs_layers_by_their_weights() -> None:
    report = QuantizationReport(model="m", configuration={})
    assert (report.average_bits, report.wall_s, report.peak_mb, report.layers) == (0, 0, 0, [])
    report.blocks = [
        BlockReport(name="0", layers=(layer("0.a", 100, 4.5), layer("0.b", 300, 2.5)), wall_s=2, peak_mb=70),
        BlockReport(name="1", layers=(), wall_s=3, peak_mb=50),
    ]
    report.outside = [layer("head", 100, 8.5)]
    assert [entry.name for entry in report.layers] == ["0.a", "0.b", "head"]
    assert report.average_bits == pytest.approx((450 + 750 + 850) / 500)
    assert (report.wall_s, report.peak_mb) == (5, 70)
    report.end_to_end = EndToEndReport(
        loss_before=2, loss_after=1, samples=3, held_out=False, best_step=1, peak_mb=80
    )
    assert report.peak_mb == 80


def test_json_holds_everything_and_no_figure_that_json_lacks(tmp_path: Path) -> None:
    report = QuantizationReport(model="m", configuration={"quantization": {"ignore_layers": ("a", "b")}})
    report.blocks = [
        BlockReport(
            name="0",
            layers=(layer("0.a", 100, 4.5, math.inf),),
            loss_before=0.5,
            loss_after=float("nan"),
            best_step=3,
            step_losses=(1.0, 0.5),
            wall_s=1.5,
            peak_mb=70.0,
        )
    ]
    report.memory.append((0.5, 70.0))
    report.notes.append("é")
    report.save_json(tmp_path / "report.json")

    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert found["format_version"] == 1
    assert found["configuration"] == {"quantization": {"ignore_layers": ["a", "b"]}}
    assert (found["average_bits"], found["wall_s"], found["peak_mb"]) == (4.5, 1.5, 70.0)
    (block,) = found["blocks"]
    assert (block["loss_before"], block["loss_after"], block["best_step"]) == (0.5, None, 3)
    assert block["step_losses"] == [1.0, 0.5]
    assert block["layers"][0]["settings"] == {
        "bits": 4,
        "group_size": 32,
        "symmetric": True,
        "weight_dtype": "int",
    }
    assert (block["layers"][0]["sqnr_db"], block["layers"][0]["loss"]) == (None, 0.25)
    assert (found["memory"], found["notes"]) == ([[0.5, 70.0]], ["é"])
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
