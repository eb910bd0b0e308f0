"""The backend for hamerspace: what is exported, opened again in another process."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from auto_round.exceptions import CheckpointError
from auto_round.hamerspace_backend import open_export
from hamerspace.artifact import read_manifest
from hamerspace.backends import BuildContext, backend_names, get_backend
from hamerspace.backends.base import build_artifact
from hamerspace.models.pytorch import read
from safetensors.numpy import load_file

# Inputs of every layer are a multiple of 128, the group size.
LLAMA = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 96, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64}
FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", LLAMA),
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
}
REOPEN = """
import sys
import numpy as np
from hamerspace.backends import get_backend
given = get_backend("auto_round").load(sys.argv[1]).run(dict(np.load(sys.argv[2])))
np.savez(sys.argv[3], **given)
"""


@pytest.fixture
def source_of(tmp_path):
    """Saves a random model of a family, and reads its folder."""

    def make(family: str):
        config, owner, fields = FAMILIES[family]
        torch.manual_seed(0)
        model = getattr(transformers, owner)(getattr(transformers, config)(**fields))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.1)
        model.save_pretrained(tmp_path / family)
        return read(tmp_path / family)

    return make


def build(source, technique: str, folder: Path, **given):
    backend = get_backend("auto_round")
    candidate = next(one for one in backend.candidates(source.info) if one.technique == technique)
    options = {**candidate.options, **given.pop("options", {})}
    folder.mkdir()
    context = BuildContext(
        source=source, candidate=replace(candidate, options=options), folder=folder, shared=folder, **given
    )
    return build_artifact(backend, context)[0]


def unpacked(folder: Path) -> dict[str, np.ndarray]:
    """Weights of an export with 4 bits: eight codes in a word, the lowest bits first; float64 [out, in]."""
    stored = load_file(folder / "model.safetensors")
    about = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert about["bits"] == 4
    less = {"auto_round:auto_gptq": 1, "auto_round": 0}[about["packing_format"]]
    shifts = 4 * np.arange(8)
    found = {}
    for name in (key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")):
        words = stored[f"{name}.qweight"].view(np.uint32)
        codes = (words[:, None, :] >> shifts[None, :, None] & 15).reshape(-1, words.shape[1])
        zero_words = stored[f"{name}.qzeros"].view(np.uint32)
        zeros = (zero_words[:, :, None] >> shifts & 15).reshape(len(zero_words), -1) + less
        scales = stored[f"{name}.scales"].astype("float64")
        rows = np.arange(len(codes)) // about["group_size"]
        found[name] = (scales[rows] * (codes.astype("float64") - zeros[rows])).T
    return found


def logits(model, feeds) -> np.ndarray:
    with torch.no_grad():
        return model(**{name: torch.from_numpy(one) for name, one in feeds.items()}).logits.numpy()


def sqnr_db(wanted, given) -> float:
    return float(10 * np.log10((wanted**2).sum() / ((wanted - given) ** 2).sum()))


def test_it_is_found_by_its_entry_point():
    assert "auto_round" in backend_names()
    assert get_backend("auto_round").is_available()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_reopens_elsewhere_has_the_weights_of_the_export(source_of, tmp_path, family):
    source = source_of(family)
    folder = tmp_path / "artifact"
    manifest = build(source, "int4-weight", folder)
    assert read_manifest(folder) == manifest
    assert not list(folder.glob("quantization_report*"))

    feeds = source.info.draw(3, 5)
    np.savez(tmp_path / "feeds.npz", **feeds)
    paths = [str(folder), str(tmp_path / "feeds.npz"), str(tmp_path / "given.npz")]
    done = subprocess.run([sys.executable, "-c", REOPEN, *paths], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    given = dict(np.load(tmp_path / "given.npz"))
    assert list(given) == ["logits"]

    model = source.load()
    layers = dict(model.named_modules())
    weights = unpacked(folder)
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    blocks = {name for name, one in layers.items() if isinstance(one, kinds)} - {"lm_head"}
    assert set(weights) == blocks
    with torch.no_grad():
        for name, weight in weights.items():
            is_transposed = isinstance(layers[name], transformers.pytorch_utils.Conv1D)
            stored = layers[name].weight
            # Normal numbers with the largest of 128 at some 2.7 deviations: 19.7 dB.
            assert sqnr_db(stored.numpy(), weight.T if is_transposed else weight) > 18
            stored.copy_(torch.from_numpy(weight.T if is_transposed else weight))
    np.testing.assert_allclose(given["logits"], logits(model, feeds), rtol=1e-4, atol=1e-4)

    # 4 bits and a scale and a zero point for 128 weights; floats stay what they were.
    quantised = sum(weight.size for weight in weights.values())
    floats = source.info.size_bytes - 4 * quantised
    assert manifest.size_bytes < floats + quantised * (4 + 20 / 128) / 8 + 30_000


def test_signround_trains_on_the_calibration_data(source_of, tmp_path):
    source = source_of("llama")
    drawn = [source.info.draw(4, seed) for seed in range(2)]
    build(source, "int4-signround", tmp_path / "trained", calibration=drawn, options={"iters": 5})
    build(source, "int4-weight", tmp_path / "nearest")
    trained, nearest = (unpacked(tmp_path / name) for name in ("trained", "nearest"))
    layers = dict(source.load().named_modules())
    assert trained.keys() == nearest.keys()
    assert any(not np.array_equal(weight, nearest[name]) for name, weight in trained.items())
    for name, weight in trained.items():
        assert sqnr_db(layers[name].weight.detach().numpy(), weight) > 15, name
    feeds = source.info.draw(3, 9)
    given = get_backend("auto_round").load(tmp_path / "trained").run(feeds)["logits"]
    assert np.isfinite(given).all()


def test_what_it_does_not_take(source_of):
    backend = get_backend("auto_round")
    info = source_of("llama").info
    assert backend.candidates(info)
    for other in (
        replace(info, form="module"),
        replace(info, path=None),
        replace(info, inputs=(replace(info.inputs[0], name="pixel_values"),)),
    ):
        assert not backend.supports_model(other)
        assert backend.candidates(other) == []


def test_damaged_exports_are_refused(source_of, tmp_path):
    folder = tmp_path / "artifact"
    build(source_of("llama"), "int4-weight", folder)
    config = json.loads((folder / "config.json").read_text())

    for change, named in (
        ({"architectures": ["pipeline"]}, "describes no model"),
        ({"model_type": "unheard-of"}, "describes no model"),
        ({"num_hidden_layers": 3}, r"layers\.2"),
        ({"vocab_size": 97}, "does not fit"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=named):
            open_export(folder)
