"""What is copied from the folder of a checkpoint, and what is not."""

from pathlib import Path

import pytest
from auto_round.exceptions import CheckpointError, ExportError
from auto_round.export._files_beside import copy_files, read_config, save_tokenizer, write_config


def test_files_beside_the_weights_are_copied_but_code_and_pickles(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "folder").mkdir(parents=True)
    target.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    wanted = [
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "LICENSE",
        "README.md",
    ]
    refused = [
        "modeling.py",
        "training_args.bin",
        "optimizer.pt",
        "state.pkl",
        "model.safetensors.index.json",
        "pytorch_model.bin.index.json",
        ".hidden.json",
        "model.safetensors",
        "run.sh",
    ]
    for name in wanted + refused:
        (source / name).write_text(name)
    (source / "pickle.txt").write_bytes(b"\x80\x04K\x01.")
    (source / "archive.model").write_bytes(b"PK\x03\x04rest")
    (source / "out.txt").symlink_to(tmp_path / "secret.txt")
    (source / "inside.txt").symlink_to(source / "README.md")
    (source / "vocab.txt").touch()
    with (source / "huge.json").open("wb") as file:
        file.truncate(100_000_001)
    copy_files(source, target)
    assert sorted(path.name for path in target.iterdir()) == sorted([*wanted, "inside.txt", "vocab.txt"])
    assert not any(path.is_symlink() for path in target.iterdir())
    assert (target / "LICENSE").read_text() == "LICENSE"


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abcd").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abcd")
    target = tmp_path / "target"
    target.mkdir()
    copy_files(snapshot, target)
    assert (target / "tokenizer.json").read_text() == "{}"


def test_a_tokenizer_of_the_users_is_saved_and_one_of_the_folder_is_not(tmp_path: Path) -> None:
    saved: list[str] = []

    class Tokenizer:
        def __init__(self, origin: str) -> None:
            self.name_or_path = origin

        def save_pretrained(self, folder: str) -> None:
            saved.append(folder)
            Path(folder, "tokenizer.json").write_text("own")
            Path(folder, "tokenization.py").write_text("code")

    target = tmp_path / "target"
    target.mkdir()
    save_tokenizer(Tokenizer(str(tmp_path / "float")), tmp_path / "float", target)
    save_tokenizer(None, tmp_path / "float", target)
    assert list(target.iterdir()) == []
    save_tokenizer(Tokenizer("elsewhere"), tmp_path / "float", target)
    assert [path.name for path in target.iterdir()] == ["tokenizer.json"]
    assert not Path(saved[0]).exists()


def test_a_configuration_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_config(tmp_path, {"model_type": "llama", "name": "\u00e9"})
    assert read_config(tmp_path) == {"model_type": "llama", "name": "\u00e9"}
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    for write in (
        lambda: copy_files(tmp_path / "source", tmp_path / "nowhere"),
        lambda: write_config(tmp_path / "nowhere", {}),
    ):
        with pytest.raises(ExportError, match=r"nowhere.* cannot be written"):
            write()
