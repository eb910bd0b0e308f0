"""Quantised weights on disk: written, read back, and what they take."""

import dataclasses
import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from auto_round.config_manager import LayerSettings
from auto_round.exceptions import ExportError
from auto_round.quantization._quantized import QuantizedWeight
from auto_round.quantization._results import ResultStore
from auto_round.quantization._rtn import quantize_rtn
from safetensors import safe_open


def made(weight_dtype: str = "int", bits: int = 4, symmetric: bool = True, rows: int = 6) -> QuantizedWeight:
    size = {"mxfp4": 32, "nvfp4": 16, "fp8": -1, "int": 32}[weight_dtype]
    settings = LayerSettings(bits=bits, group_size=size, symmetric=symmetric, weight_dtype=weight_dtype)
    weight = torch.randn(rows, 64, generator=torch.Generator().manual_seed(bits))
    return quantize_rtn(weight, settings, torch.float16)


def same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    def bits_of(value: torch.Tensor | None) -> tuple[object, ...]:
        if value is None:
            return (None,)
        return value.dtype, tuple(value.shape), value.contiguous().flatten().view(torch.uint8).tolist()

    parts = ("codes", "scale", "zero", "global_scale")
    return one.settings == other.settings and all(
        bits_of(getattr(one, part)) == bits_of(getattr(other, part)) for part in parts
    )


KINDS = [("int", bits, symmetric) for bits in range(2, 9) for symmetric in (True, False)]
KINDS += [("mxfp4", 4, True), ("nvfp4", 4, True), ("fp8", 8, True)]


@pytest.mark.parametrize(("weight_dtype", "bits", "symmetric"), KINDS)
def test_what_is_written_is_read_bit_by_bit(
    weight_dtype: str, bits: int, symmetric: bool, tmp_path: Path
) -> None:
    weight = made(weight_dtype, bits, symmetric)
    store = ResultStore(tmp_path)
    store.write("block", {"a.b": weight, "a.c": made(rows=3)})
    assert store.layers == {"a.b": weight.settings, "a.c": made().settings}
    assert same(store.read("a.b"), weight)
    assert same(store.read("a.c"), made(rows=3))
    assert torch.equal(store.read("a.b").dequantize(), weight.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_codes_take_their_bits_and_no_more(bits: int, tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    store.write("block", {"a": made(bits=bits)})
    with safe_open(tmp_path / "block.safetensors", "pt") as file:
        assert file.get_tensor("a:codes").nbytes == 6 * 64 * bits / 8
        assert file.metadata()["format_version"] == "1"
        settings, width = json.loads(file.metadata()["layers"])["a"]
        assert (settings["bits"], settings["group_size"], width) == (bits, 32, 64)


def test_layers_of_several_files_are_found(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    for index in range(3):
        store.write(f"block-{index}", {f"layers.{index}": made(bits=index + 2)})
    assert [store.read(f"layers.{index}").settings.bits for index in range(3)] == [2, 3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"block-{index}.safetensors" for index in range(3)
    ]


def test_scales_are_replaced_all_at_once_or_not_at_all(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    before = {name: made(bits=bits) for name, bits in (("a", 2), ("b", 3), ("c", 4))}
    for name, weight in before.items():
        store.write(f"block-{name}", {name: weight})
    new = {name: weight.scale * 2 for name, weight in before.items()}

    def interrupted() -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        yield "scales-a", {"a": new["a"]}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.replace_scales(interrupted())
    assert all(same(store.read(name), weight) for name, weight in before.items())
    assert not list(tmp_path.glob("scales*"))
    store.replace_scales((f"scales-{name}", {name: new[name]}) for name in ("a", "b"))
    for name, weight in before.items():
        scale = weight.scale if name == "c" else new[name]
        assert same(store.read(name), dataclasses.replace(weight, scale=scale))
    # What is quantised anew has its own scales.
    store.write("block-a", {"a": before["a"]})
    assert same(store.read("a"), before["a"])


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may have more than 4000 bytes, as if the disk were full."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_leaves_nothing_and_is_named(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    with pytest.raises(ExportError, match=r"block\.safetensors cannot be written.*workspace_dir"):
        store.write("block", {"a": made(rows=600)})
    assert list(tmp_path.iterdir()) == []
    assert store.layers == {}
