import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import load_torch_model
from llm_trainer import _tensor_files
from llm_trainer.exceptions import ConfigurationError, FormatError
from llm_trainer.models import TransformerLM
from llm_trainer.models._hf_shards import shard_bytes
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"


def same(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def shards(directory):
    return sorted(directory.glob("model-*.safetensors"))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, 1),
        ("5GB", 5_000_000_000),
        ("512MiB", 536_870_912),
        (" 3 kb ", 3000),
        ("2kib", 2048),
        ("1TB", 10**12),
        ("1TiB", 2**40),
    ],
)
def test_sizes_of_shards(size, expected):
    assert shard_bytes(size) == expected


@pytest.mark.parametrize(
    "size", [0, -1, "0GB", "5", "GB", "1.5GB", "5 GB please", True, 1e9, None, "9" * 99 + "GB"]
)
def test_impossible_sizes_are_refused_before_anything_is_written(size, build, tmp_path):
    with pytest.raises(ConfigurationError, match="max_shard_size is"):
        build().save_pretrained(tmp_path / "new", max_shard_size=size)
    assert not (tmp_path / "new").exists()


def test_shards_load_equal_and_are_small(model, ids, tmp_path):
    model.save_pretrained(tmp_path, "10KB")
    found = shards(tmp_path)
    assert [path.name for path in found] == [
        f"model-{number:05d}-of-{len(found):05d}.safetensors" for number in range(1, len(found) + 1)
    ]
    index = json.loads((tmp_path / INDEX).read_text())
    sizes = []
    for path in found:
        tensors = load_file(path)
        assert all(index["weight_map"][name] == path.name for name in tensors)
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        assert sizes[-1] <= 10_000 or len(tensors) == 1
    assert len(found) > 1
    assert sum(sizes) == index["metadata"]["total_size"] == model.get_num_params() * 4
    loaded = TransformerLM.from_pretrained(tmp_path)
    assert same(loaded, model)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert (loaded.head.weight is loaded.embedding.weight) is model.config.tie_embeddings


def test_the_loader_of_huggingface_hub_reads_the_shards(build, tmp_path):
    model = build(tie_embeddings=False)
    model.save_pretrained(tmp_path, 4000)
    peer = TransformerLM(model.config)
    # With strict=True it asks each shard for all of the tensors.
    result = load_torch_model(peer, tmp_path, strict=False)
    assert (list(result.missing_keys), list(result.unexpected_keys)) == ([], [])
    assert same(peer, model)


def test_a_loaded_model_is_its_own_and_as_it_was_saved(build, tmp_path):
    model = build().bfloat16()
    model.save_pretrained(tmp_path)
    loaded = TransformerLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    # Written over in place, as a careless copy would: what is mapped would change.
    path = tmp_path / "model.safetensors"
    with path.open("rb+") as file:
        file.write(bytes(path.stat().st_size))
    assert same(loaded, model)
    assert loaded.get_num_params(trainable_only=True) == loaded.get_num_params()
    loaded.embedding.requires_grad_(False)
    assert loaded.get_num_params(trainable_only=True) == loaded.get_num_params() - 61 * 32


def test_files_of_earlier_saves_go_and_others_stay(build, tmp_path):
    (tmp_path / "other.safetensors").write_text("mine")
    (tmp_path / "model-card.md").write_text("mine")
    for left_over in (".model-00001-of-00009.safetensors.staged", ".model.safetensors.0a1b2c3d.tmp"):
        (tmp_path / left_over).write_text("of a save that was killed")
    ours = {"config.json", "other.safetensors", "model-card.md"}
    for size in (3000, "10KB", "5GB", "10KB"):
        model = build()
        model.save_pretrained(tmp_path, size)
        weights = (
            {"model.safetensors"} if size == "5GB" else {INDEX} | {path.name for path in shards(tmp_path)}
        )
        assert {path.name for path in tmp_path.iterdir()} == ours | weights
        if size != "5GB":
            named = set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values())
            assert named == weights - {INDEX}
        assert same(TransformerLM.from_pretrained(tmp_path), model)


def outcome(folder, old, new):
    try:
        loaded = TransformerLM.from_pretrained(folder)
    except FormatError as error:
        return "error" if "a save was cut short" in str(error) else f"unclear: {error}"
    for name, model in (("old", old), ("new", new)):
        if same(loaded, model):
            return name if loaded.config == model.config else f"{name} with another configuration"
    return "mixture"


@pytest.mark.parametrize("changes", [{}, {"norm_eps": 1e-3}], ids=["same configuration", "another"])
@pytest.mark.parametrize(
    ("before", "after"), [("5GB", "5GB"), ("5GB", "10KB"), ("10KB", "5GB"), ("10KB", "10KB"), (4000, "10KB")]
)
def test_a_crash_leaves_the_old_the_new_or_an_error(build, tmp_path, monkeypatch, changes, before, after):
    """What is in the folder before each step of a save is what a crash there leaves."""
    old, new = build(), build(**changes)
    folder = tmp_path / "model"
    old.save_pretrained(folder, before)
    count = 0

    def watch(owner, name):
        original = getattr(owner, name)

        def step(*args, **kwargs):
            nonlocal count
            shutil.copytree(folder, tmp_path / f"{count:03d}")
            count += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, step)

    for owner, name in ((Path, "replace"), (Path, "unlink"), (Path, "chmod"), (os, "fsync")):
        watch(owner, name)
    watch(_tensor_files, "save_file")
    new.save_pretrained(folder, after)
    monkeypatch.undo()
    outcomes = [outcome(tmp_path / f"{number:03d}", old, new) for number in range(count)]
    assert same(TransformerLM.from_pretrained(folder), new)
    assert outcomes[0] == "old"
    # Once the old one is gone it does not come back.
    assert outcomes == sorted(outcomes, key=["old", "error", "new"].index)
    # Each file is written, given its permissions and synced before the first is replaced.
    assert outcomes.count("old") >= 3 * (1 if after == "5GB" else len(shards(folder)))


@pytest.mark.parametrize("size", ["5GB", "10KB"])
def test_damage_to_any_file_of_weights_is_found_and_named(build, tmp_path, size):
    build().save_pretrained(tmp_path / "good", size)
    build().save_pretrained(tmp_path / "other", size)
    for name in sorted(path.name for path in (tmp_path / "good").glob("model*.safetensors")):

        def damaged(harm, name=name):
            shutil.rmtree(tmp_path / "bad", ignore_errors=True)
            shutil.copytree(tmp_path / "good", tmp_path / "bad")
            harm(tmp_path / "bad" / name)
            with pytest.raises(FormatError, match=rf"{name}\b") as caught:
                TransformerLM.from_pretrained(tmp_path / "bad")
            return str(caught.value)

        def cut(path):
            os.truncate(path, path.stat().st_size - 1)

        def flip(path):
            content = bytearray(path.read_bytes())
            content[-3] ^= 1
            path.write_bytes(content)

        def without_tensors(path):
            save_file({}, path)

        assert "is damaged" in damaged(cut)
        assert "its tensors are not those that were saved" in damaged(flip)
        assert "does not exist" in damaged(Path.unlink)
        assert damaged(without_tensors)
        if size != "5GB":
            assert "two saves were mixed" in damaged(
                lambda path, name=name: shutil.copy(tmp_path / "other" / name, path)
            )


@pytest.mark.parametrize(
    "place",
    [
        "../outside.safetensors",
        "/etc/outside.safetensors",
        "..",
        "",
        "a\\b.safetensors",
        "x.bin",
        7,
        None,
        "a\0.safetensors",
    ],
)
def test_an_index_cannot_point_elsewhere(build, tmp_path, place):
    build().save_pretrained(tmp_path / "model", "10KB")
    shutil.copy(shards(tmp_path / "model")[0], tmp_path / "outside.safetensors")
    path = tmp_path / "model" / INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["embedding.weight"] = place
    path.write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"index.json says that tensor 'embedding.weight' is in") as caught:
        TransformerLM.from_pretrained(tmp_path / "model")
    assert "same folder" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("weight_map"), "has no weight_map"),
        (lambda index: index.update(weight_map=[]), "has no weight_map"),
        (
            lambda index: index["weight_map"].pop("embedding.weight"),
            "disagree on where tensor 'embedding.weight'",
        ),
        (
            lambda index: index["weight_map"].update(extra=index["weight_map"]["embedding.weight"]),
            "disagree on where tensor 'extra'",
        ),
        (lambda index: index.pop("metadata"), "a save was cut short"),
        (lambda index: index.update(metadata=3), "a save was cut short"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(build, tmp_path, change, message):
    build().save_pretrained(tmp_path, "10KB")
    index = json.loads((tmp_path / INDEX).read_text())
    change(index)
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(FormatError, match=message):
        TransformerLM.from_pretrained(tmp_path)


def test_weights_of_another_writer_are_read(build, ids, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    save_file(
        {name: tensor for name, tensor in model.state_dict().items() if name != "head.weight"},
        tmp_path / "model.safetensors",
    )
    assert same(TransformerLM.from_pretrained(tmp_path), model)
    # A head of its own that the configuration does not have, and the other way round.
    untied = build(tie_embeddings=False)
    untied.save_pretrained(tmp_path)
    save_file(
        {name: tensor for name, tensor in untied.state_dict().items() if name != "head.weight"},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(FormatError, match=r"lacks tensor 'head.weight'"):
        TransformerLM.from_pretrained(tmp_path)
    save_file(
        {name: tensor.int() for name, tensor in untied.state_dict().items()}, tmp_path / "model.safetensors"
    )
    with pytest.raises(FormatError, match=r"type I32, but config.json calls for floating point"):
        TransformerLM.from_pretrained(tmp_path)
