"""The command, as a user runs it."""

import json
import subprocess
import sys

import gguf
import pytest
import torch
from bitmodels import AutoBitModel, BitMLPConfig, BitMLPModel, BitTransformerConfig, BitTransformerLM
from bitmodels.cli import main
from bitmodels.formats import huggingface


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    config = BitTransformerConfig(
        vocab_size=40, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4
    )
    model = BitTransformerLM(config)
    model.save_pretrained(root / "lm")
    huggingface.save(model, root / "hf")
    (root / "hf" / "tokenizer_config.json").write_text("{}")
    BitMLPModel(BitMLPConfig()).save_pretrained(root / "mlp")
    return root


def test_analyze(folders, capsys):
    assert main(["analyze", str(folders / "mlp"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["quantized_params"] == 256 * 128 + 128 * 128 + 128 * 10
    assert main(["analyze", str(folders / "hf")]) == 0
    text = capsys.readouterr().out
    assert "model.layers.0.mlp.up_proj" in text
    assert "stored bits for each ternary weight" in text


def test_convert_and_export(folders, tmp_path, capsys):
    ids = torch.randint(40, (1, 6))
    model = AutoBitModel.from_pretrained(folders / "lm").deploy()
    assert main(["convert", str(folders / "hf"), str(tmp_path / "own")]) == 0
    own = AutoBitModel.from_pretrained(tmp_path / "own")
    assert own.is_deployed
    assert torch.equal(own(ids), model(ids))
    assert (tmp_path / "own" / "tokenizer_config.json").exists()
    arguments = ["convert", str(tmp_path / "own"), str(tmp_path / "hf"), "--to", "huggingface"]
    assert main([*arguments, "--linear-class", "autobitlinear"]) == 0
    assert torch.equal(huggingface.load(tmp_path / "hf")(ids), model(ids))
    assert main([*arguments, "--linear-class", "autobitlinear"]) == 1
    assert "add --force" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
    assert main(["convert", str(folders / "lm"), str(tmp_path / "floats"), "--keep-floats"]) == 0
    assert not AutoBitModel.from_pretrained(tmp_path / "floats").is_deployed
    capsys.readouterr()
    target = tmp_path / "m.gguf"
    assert main(["export", str(tmp_path / "hf"), str(target), "--type", "TQ1_0"]) == 0
    assert "without a vocabulary" in capsys.readouterr().out
    assert len(gguf.GGUFReader(target).tensors) == 13
    assert main(["export", str(tmp_path / "hf"), str(target)]) == 1
    assert main(["export", str(tmp_path / "hf"), str(target), "--force"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["analyze", "nothing"], "config.json does not exist"),
        (["convert", "lm", "lm"], "folder of MODEL"),
        (["convert", "mlp", "out", "--to", "huggingface"], "not for a BitMLPModel"),
        (["export", "mlp", "m.gguf"], "not for a BitMLPModel"),
        (["export", "lm", "m.gguf", "--tokenizer", "none.json"], "none.json does not exist"),
        (["bench", "--shapes", "big"], "4096x4096"),
        (["bench", "--shapes", "\u00b2x3"], "4096x4096"),
        (["bench", "--batch", "0"], "above zero"),
    ],
)
def test_errors_are_one_line(arguments, message, folders, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    before = sorted(folders.rglob("*"))
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("bitlab: ")
    assert error.count("\n") == 1
    assert message in error
    assert sorted(folders.rglob("*")) == before


def test_a_missing_package_is_named(folders, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["export", str(folders / "lm"), str(tmp_path / "m.gguf")]) == 1
    assert 'pip install "gguf>=0.17"' in capsys.readouterr().err


def test_bench(capsys):
    arguments = ["bench", "--shapes", "64x96", "128x32", "--batch", "1", "3", "--rounds", "1"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["results"]
    assert [(row["rows"], row["columns"], row["batch"]) for row in found] == [
        (64, 96, 1),
        (64, 96, 3),
        (128, 32, 1),
        (128, 32, 3),
    ]
    assert all(row["ternary_us"] > 0 and row["bf16_us"] > 0 for row in found)
    assert main([*arguments]) == 0
    assert "64 x 96" in capsys.readouterr().out


def test_help_teaches():
    command = [sys.executable, "-c", "from bitmodels.cli import main; main(['--help'])"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in ("analyze", "convert", "export", "bench"):
        assert name in out
