"""Checkpoint folders: what is found of truncated, altered, missing and half-written ones."""

import copy
import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from llm_trainer.exceptions import CheckpointError, TrainingError
from llm_trainer.training import _checkpoint_folder, create_optimizer
from llm_trainer.training._checkpoint_folder import (
    newest_checkpoint,
    remove_unfinished,
    verify_checkpoint,
    write_checkpoint,
)
from llm_trainer.training._state import load_state, random_state, restore_random_state, save_state
from llm_trainer.training.utils import load_checkpoint, save_checkpoint
from torch import nn


def write(parent, step, run_id="ab", keep=None, content=b"x" * 1000):
    def files(folder):
        (folder / "a.bin").write_bytes(content + str(step).encode())
        (folder / "b.json").write_text(json.dumps({"step": step}))

    return write_checkpoint(parent, step, run_id, files, keep)


def names(parent):
    return sorted(path.name for path in parent.iterdir())


def test_a_checkpoint_verifies_and_says_what_it_is(tmp_path):
    written = write(tmp_path / "made", 7)
    found = verify_checkpoint(tmp_path / "made/checkpoint-7")
    assert found == written
    assert (found.step, found.run_id, found.serial) == (7, "ab", 1)
    manifest = json.loads((found.path / "manifest.json").read_text())
    assert manifest["files"]["a.bin"]["bytes"] == 1001
    assert set(manifest["files"]) == {"a.bin", "b.json"}


@pytest.mark.parametrize("name", ["a.bin", "b.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "one bit", "deleted", "grown", "emptied"])
def test_damage_of_any_file_is_named_and_fallen_back_from(tmp_path, name, damage):
    write(tmp_path, 1)
    write(tmp_path, 2)
    damaged = tmp_path / "checkpoint-2" / name
    data = damaged.read_bytes()
    match damage:
        case "truncated":
            damaged.write_bytes(data[: len(data) // 2])
        case "one bit":
            for place in range(len(data)) if len(data) < 600 else (0, len(data) // 3, len(data) - 1):
                altered = bytearray(data)
                altered[place] ^= 1 << (place % 8)
                damaged.write_bytes(altered)
                with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
                    verify_checkpoint(damaged.parent)
        case "deleted":
            damaged.unlink()
        case "grown":
            damaged.write_bytes(data + b"\n")
        case _:
            damaged.write_bytes(b"")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        verify_checkpoint(damaged.parent)
    newest, passed = newest_checkpoint(tmp_path)
    assert newest.path == tmp_path / "checkpoint-1"
    assert len(passed) == 1
    assert str(damaged) in passed[0]


def test_rotation_keeps_the_newest_of_the_run_and_all_of_others(tmp_path):
    write(tmp_path, 1, run_id="other")
    for step in (5, 10, 15, 20):
        write(tmp_path, step, keep=2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-15", "checkpoint-20"]
    # After going back to step 5 of the same run, what comes is newer than what lies further on.
    write(tmp_path, 6, keep=2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-20", "checkpoint-6"]
    assert newest_checkpoint(tmp_path)[0].step == 6


def test_a_name_that_is_taken(tmp_path):
    write(tmp_path, 3, run_id="other", content=b"other")
    write(tmp_path, 3, content=b"mine")
    assert (tmp_path / "checkpoint-3/a.bin").read_bytes() == b"mine3"
    (kept,) = [path for path in tmp_path.iterdir() if path.name != "checkpoint-3"]
    assert (kept / "a.bin").read_bytes() == b"other3"
    assert verify_checkpoint(kept).run_id == "other"
    write(tmp_path, 3, content=b"again")
    assert len(names(tmp_path)) == 2
    assert newest_checkpoint(tmp_path)[0].path == tmp_path / "checkpoint-3"
    assert (tmp_path / "checkpoint-3/a.bin").read_bytes() == b"again3"


def test_what_cannot_be_read_back_is_not_put_in_place(tmp_path, monkeypatch):
    write(tmp_path, 1)
    fsync = os.fsync

    def lying_disk(descriptor):
        fsync(descriptor)
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if path.endswith("a.bin"):
            with Path(path).open("r+b") as file:
                file.write(b"?")

    monkeypatch.setattr(os, "fsync", lying_disk)
    with pytest.raises(CheckpointError, match=r"a\.bin was altered"):
        write(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["checkpoint-1"]
    verify_checkpoint(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("fails", ["a.bin", "manifest.json"])
def test_an_error_while_writing_leaves_what_was_there(tmp_path, fails, monkeypatch):
    write(tmp_path, 1)
    fsync = os.fsync

    def full(descriptor):
        if str(Path(f"/proc/self/fd/{descriptor}").readlink()).endswith(fails):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["checkpoint-1"]


def test_a_disk_that_is_really_full_loses_nothing(small_disk):
    disk = small_disk(1024)
    write(disk, 1, content=b"x" * 600_000)
    with pytest.raises(OSError, match="No space left"):
        write(disk, 2, keep=1, content=b"y" * 600_000)
    assert names(disk) == ["checkpoint-1"]
    verify_checkpoint(disk / "checkpoint-1")
    write(disk, 3, keep=1, content=b"z" * 100_000)
    assert names(disk) == ["checkpoint-3"]


def test_leftovers_of_a_killed_process_are_removed_and_are_no_checkpoints(tmp_path):
    code = textwrap.dedent("""
        import importlib.util, os, sys
        from pathlib import Path
        # By its path, because the package around it would load torch.
        spec = importlib.util.spec_from_file_location("folder", sys.argv[4])
        folder = sys.modules["folder"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(folder)
        parent, moment = Path(sys.argv[1]), sys.argv[2]
        def die(*_): os._exit(9)
        def files(path): (path / "a.bin").write_bytes(b"x" * 1000)
        folder.write_checkpoint(parent, 1, "ab", files, None)
        if moment == "writing":
            def files(path):
                (path / "a.bin").write_bytes(b"x" * 10)
                die()
        elif moment == "verifying":
            folder.verify_checkpoint = die
        elif moment == "removing":
            folder.shutil.rmtree = lambda path, **_: die() if path.name.endswith("old") else None
        elif moment == "renaming":
            rename = Path.rename
            def rename_and_die(self, target):
                rename(self, target)
                die()
            Path.rename = rename_and_die
        folder.write_checkpoint(parent, int(sys.argv[3]), "ab", files, 1)
        os._exit(3)
        """)
    for moment, step, left in (
        ("writing", 2, 1),
        ("verifying", 2, 1),
        ("removing", 2, 2),
        ("renaming", 2, 2),
        ("renaming", 1, 1),
    ):
        parent = tmp_path / f"{moment}{step}"
        parent.mkdir()
        arguments = [str(parent), moment, str(step), _checkpoint_folder.__file__]
        done = subprocess.run([sys.executable, "-c", code, *arguments], check=False)
        assert done.returncode == 9, moment
        assert any(name.startswith(".") for name in names(parent)) == (moment != "renaming" or step == 1)
        newest, passed = newest_checkpoint(parent)
        assert newest.step == left, moment
        assert not passed
        remove_unfinished(parent)
        assert not any(name.startswith(".") for name in names(parent)), moment
        assert newest_checkpoint(parent)[0].step == left


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"version": 99}, "format version 99"),
        (lambda m: m | {"files": {"../a.bin": {"bytes": 1, "sha256": "0"}}}, "outside of its folder"),
        (lambda m: m | {"files": {"/etc/passwd": {"bytes": 1, "sha256": "0"}}}, "outside of its folder"),
        (lambda m: m | {"files": 3}, "not the manifest"),
        (lambda m: m | {"step": None}, "not the manifest"),
        (lambda m: m | {"format": "zip"}, "not the manifest"),
        (lambda m: [1], "holds a list"),
    ],
)
def test_hostile_manifests(tmp_path, change, message):
    path = write(tmp_path, 1).path / "manifest.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    changed = change(content)
    path.write_bytes(_checkpoint_folder._manifest_bytes(changed) if isinstance(changed, dict) else b"[1]")
    with pytest.raises(CheckpointError, match=message):
        verify_checkpoint(path.parent)


def test_state_comes_back_to_the_bit(tmp_path):
    state = {
        "numbers": [0.1, float("inf"), -0.0, 3, None, True, "text"],
        "by number": {0: {"t": torch.randn(3, 2)}, 7: (torch.tensor(1.5), [torch.arange(3)])},
        "low": torch.randn(4).to(torch.bfloat16),
        "empty": {},
    }
    save_state(tmp_path / "s", state)
    back = load_state(tmp_path / "s")
    assert back["numbers"] == state["numbers"]
    assert str(back["numbers"][2]) == "-0.0"
    assert list(back["by number"]) == [0, 7]
    assert isinstance(back["by number"][7], tuple)
    assert torch.equal(back["by number"][0]["t"], state["by number"][0]["t"])
    assert torch.equal(back["by number"][7][1][0], torch.arange(3))
    assert torch.equal(back["low"], state["low"])
    assert back["empty"] == {}
    save_state(tmp_path / "s", {"n": 1})
    assert load_state(tmp_path / "s") == {"n": 1}


def test_random_numbers_go_on_alike():
    import random

    import numpy as np

    def draw():
        return random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))

    draw()
    before = random_state()
    drawn = [draw() for _ in range(3)]
    draw()
    restore_random_state(before)
    assert [draw() for _ in range(3)] == drawn


def test_a_loop_of_ones_own_is_saved_and_goes_on_alike(tmp_path):
    x = torch.randn(8, 4)

    def make():
        model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def train(model, optimizer, scheduler, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            scheduler.step()

    parts = make()
    train(*parts, 3)
    path = save_checkpoint(tmp_path, *parts, step=3, keep=2, extra={"best": 0.5, "seen": [1, 2]})
    train(*parts, 3)
    resumed = make()
    found = load_checkpoint(tmp_path, *resumed)
    assert found == {"step": 3, "path": path, "extra": {"best": 0.5, "seen": [1, 2]}}
    train(*resumed, 3)
    for one, other in zip(parts[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(CheckpointError, match="another model"):
        load_checkpoint(path, nn.Linear(4, 4))
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        load_checkpoint(tmp_path / "nothing", nn.Linear(4, 4))
    (path / "state.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"state\.safetensors has 0 bytes"):
        load_checkpoint(path, *resumed)
    with pytest.raises(CheckpointError, match=r"state\.safetensors has 0 bytes"):
        load_checkpoint(tmp_path, *resumed)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        # The same memory under another shape.
        self.register_buffer("flat", self.table.weight.detach()[:2].view(-1))

    def forward(self, ids, labels):
        return nn.functional.cross_entropy(self.head(self.table(ids)).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("kind", ["TransformerLM", "a module of one's own"])
def test_tied_weights_are_saved_and_go_on_alike(tmp_path, build, kind):
    ids = torch.randint(0, 7, (4, 12))

    def make():
        model = build() if kind == "TransformerLM" else Tied()
        return model, create_optimizer(model, learning_rate=0.1)

    def train(model, optimizer):
        for _ in range(2):
            optimizer.zero_grad()
            loss = model(ids, labels=ids)
            getattr(loss, "loss", loss).backward()
            optimizer.step()

    whole, resumed = make(), make()
    assert whole[0].head.weight is (getattr(whole[0], "embedding", None) or whole[0].table).weight
    train(*whole)
    path = save_checkpoint(tmp_path, *whole, step=2)
    train(*whole)
    load_checkpoint(path, *resumed)
    train(*resumed)
    for name, tensor in whole[0].state_dict().items():
        assert torch.equal(tensor, resumed[0].state_dict()[name]), name


def test_what_is_not_finite_is_not_saved(tmp_path, build):
    def trained():
        model = build()
        optimizer = create_optimizer(model, "muon")
        model(torch.zeros(1, 4, dtype=torch.long), labels=torch.zeros(1, 4, dtype=torch.long)).loss.backward()
        optimizer.step()
        return model, optimizer

    for number in (float("nan"), float("inf")):
        model, optimizer = trained()
        with torch.no_grad():
            model.final_norm.weight[0] = number
        with pytest.raises(TrainingError, match=r"final_norm\.weight is not finite after step 3"):
            save_checkpoint(tmp_path, model, optimizer, step=3)
        model, optimizer = trained()
        optimizer.parts["adamw"].state[model.final_norm.weight]["exp_avg"][0] = number
        with pytest.raises(TrainingError, match="exp_avg of the optimizer's parameter"):
            save_checkpoint(tmp_path, model, optimizer)
    norm = nn.BatchNorm1d(2)
    norm.running_mean[1] = float("nan")
    with pytest.raises(TrainingError, match="running_mean"):
        save_checkpoint(tmp_path, norm)
    assert not list(tmp_path.iterdir())
    # Infinity in a buffer is a mask's.
    norm.running_mean[1] = -float("inf")
    save_checkpoint(tmp_path, norm)


def _wider(build):
    return build(d_ff=64), "adamw"


def _fewer_layers(build):
    return build(n_layers=1), "adamw"


def _another_optimizer(build):
    return build(), "adam"


def _other_groups(build):
    # The first part fits, the second does not.
    model = build()
    model.final_norm.requires_grad_(False)
    return model, "muon"


@pytest.mark.parametrize("other", [_wider, _fewer_layers, _another_optimizer, _other_groups])
def test_a_checkpoint_that_is_refused_changes_nothing(tmp_path, build, other):
    def parts(model, kind):
        optimizer = create_optimizer(model, kind)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        ids = torch.randint(0, 7, (2, 5))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        scheduler.step()
        return model, optimizer, scheduler

    given = parts(*other(build))
    saved = parts(build(), "muon" if other is _other_groups else "adamw")
    path = save_checkpoint(tmp_path, *saved)
    for part in given[1:]:
        part.step()
    before = copy.deepcopy([part.state_dict() for part in given])
    random = torch.get_rng_state()
    with pytest.raises(CheckpointError, match="another model or optimizer"):
        load_checkpoint(path, *given)
    torch.testing.assert_close([part.state_dict() for part in given], before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    scheduler = torch.optim.lr_scheduler.LinearLR(saved[1])
    with pytest.raises(CheckpointError, match="its scheduler is ExponentialLR, the one given LinearLR"):
        load_checkpoint(path, *saved[:2], scheduler)
