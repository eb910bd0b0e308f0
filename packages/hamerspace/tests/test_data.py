from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hamerspace import ModelInfo, TensorSpec
from hamerspace.exceptions import ModelInputError
from hamerspace.measure.data import calibration_batches, cut, read_batches

IMAGES = ModelInfo(
    framework="pytorch",
    name="images",
    inputs=(TensorSpec(name="x", dtype="float32", shape=(1, 2, 3)),),
)
TEXTS = ModelInfo(
    framework="pytorch",
    name="texts",
    inputs=(
        TensorSpec(name="ids", dtype="int64", shape=("batch", 4), high=9),
        TensorSpec(name="mask", dtype="int64", shape=("batch", 4)),
    ),
)


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 2, 3)).astype("float32")


class MapStyle:
    def __len__(self) -> int:
        return 3

    def __getitem__(self, place: int) -> tuple[np.ndarray, int]:
        if place >= 3:
            raise IndexError
        return images(3)[place], place


def generated() -> Iterator[np.ndarray]:
    yield images(2)
    yield images(1)


@pytest.mark.parametrize(
    ("data", "samples", "labels"),
    [
        (images(5), 5, None),
        (torch.from_numpy(images(5)), 5, None),
        ({"x": images(5)}, 5, None),
        ({"x": images(5), "labels": np.arange(5)}, 5, 5),
        ((images(5), np.arange(5)), 5, 5),
        ([images(2), images(3)], 5, None),
        ([(images(2), np.arange(2)), (images(3), np.arange(3))], 5, 5),
        ([({"x": images(2)}, [0, 1])], 2, 2),
        (MapStyle(), 3, 3),
        (generated(), 3, None),
        (
            torch.utils.data.DataLoader(
                torch.utils.data.TensorDataset(torch.from_numpy(images(5)), torch.arange(5)), batch_size=2
            ),
            5,
            5,
        ),
    ],
)
def test_every_usual_form_is_read(data: Any, samples: int, labels: int | None) -> None:
    batches = read_batches(data, IMAGES)
    assert sum(one.samples for one in batches) == samples
    found = [one.labels for one in batches if one.labels is not None]
    assert (sum(len(one) for one in found) or None) == labels
    assert all(one.feeds["x"].dtype == np.float32 for one in batches)


def test_several_inputs_by_name_and_by_position() -> None:
    ids, mask = np.ones((3, 4), np.int64), np.ones((3, 4), np.int64)
    for data in (
        {"ids": ids, "mask": mask},
        (ids, mask),
        [(ids, mask, np.arange(3))],
        [{"ids": ids, "mask": mask}],
    ):
        batch = read_batches(data, TEXTS)[0]
        assert set(batch.feeds) == {"ids", "mask"}
        assert batch.samples == 3


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "empty"),
        ("some text", "turn it into tensors"),
        (7, "give an array"),
        (images(2).astype("int64"), "int64"),
        (np.full((1, 2, 3), np.nan, "float32"), "NaN"),
        (np.ones((1, 3, 2), "float32"), r"\[1, 3, 2\]"),
        ([{"y": images(1)}], "lacks"),
        (np.array([["a"]]), "dtype"),
    ],
)
def test_what_does_not_fit_is_named(data: Any, said: str) -> None:
    with pytest.raises(ModelInputError, match=said):
        read_batches(data, IMAGES)


def test_floats_are_no_token_ids() -> None:
    with pytest.raises(ModelInputError, match="float32"):
        read_batches([(np.ones((1, 4), np.float32), np.ones((1, 4), np.int64))], TEXTS)


@pytest.mark.parametrize("ids", [[[0, 1, 2, 9]], [[-1, 1, 2, 3]]])
def test_token_ids_past_the_vocabulary_are_named(ids: list[list[int]]) -> None:
    with pytest.raises(ModelInputError, match=r"ids holds .* knows 0 to 8"):
        read_batches({"ids": np.array(ids), "mask": np.ones((1, 4), "int64")}, TEXTS)


@pytest.mark.parametrize("wrap", [list, np.array, torch.tensor])
def test_labels_may_be_a_list_and_are_one_a_sample(wrap: Any) -> None:
    for data in ((images(3), wrap([0, 1, 0])), [(images(3), wrap([0, 1, 0]))]):
        (batch,) = read_batches(data, IMAGES)
        np.testing.assert_array_equal(batch.labels, [0, 1, 0])
    for data in ([(images(3), wrap([0, 1]))], {"x": images(3), "labels": wrap([0, 1])}):
        with pytest.raises(ModelInputError, match="3 samples and 2 labels"):
            read_batches(data, IMAGES)
    # The items of a data set are single samples with single labels.
    batches = read_batches([(one, label) for one, label in zip(images(3), [2, 0, 1], strict=True)], IMAGES)
    assert [list(one.labels) for one in batches if one.labels is not None] == [[2], [0], [1]]


def test_whole_data_sets_go_through_in_parts() -> None:
    ids = np.arange(1000 * 4).reshape(1000, 4) % 9
    data = {"ids": ids, "mask": np.ones_like(ids), "labels": np.arange(1000)}
    batches = read_batches(data, TEXTS)
    assert max(one.samples for one in batches) == 64
    np.testing.assert_array_equal(np.concatenate([one.feeds["ids"] for one in batches]), ids)
    np.testing.assert_array_equal(np.concatenate([one.labels for one in batches]), np.arange(1000))
    assert sum(len(one["ids"]) for one in cut([one.feeds for one in batches], TEXTS, limit=256)) == 256


def test_inputs_of_different_numbers_are_named() -> None:
    with pytest.raises(ModelInputError, match="'ids': 3, 'mask': 2"):
        read_batches({"ids": np.ones((3, 4), "int64"), "mask": np.ones((2, 4), "int64")}, TEXTS)


def test_inputs_and_labels_as_lists_and_of_different_numbers() -> None:
    (batch,) = read_batches((images(3).tolist(), [1, 0, 1]), IMAGES)
    assert batch.labels is not None
    assert (batch.samples, list(batch.labels)) == (3, [1, 0, 1])
    for labels in (np.eye(5, dtype="float32")[:2], np.array([1, 0]), [1, 0]):
        with pytest.raises(ModelInputError, match="3 samples and 2 labels"):
            read_batches((images(3), labels), IMAGES)


def test_a_number_beside_samples_stays_one() -> None:
    info = replace(IMAGES, inputs=(TensorSpec(name="x", dtype="float32", shape=(2, 3)),
                                   TensorSpec(name="scale", dtype="float32", shape=())))  # fmt: skip
    batches = read_batches({"x": np.ones((5, 3), "float32"), "scale": np.float32(2)}, info)
    cuts = cut([one.feeds for one in batches], info)
    assert [(one["x"].shape, one["scale"].shape, list(one)) for one in cuts] == [
        ((2, 3), (), ["x", "scale"])
    ] * 3


def test_other_precisions_are_converted() -> None:
    found = read_batches([(np.ones((1, 4), np.int32), np.ones((1, 4), bool))], TEXTS)[0].feeds
    assert {array.dtype.name for array in found.values()} == {"int64"}


def test_batches_of_the_models_own_size() -> None:
    three = ModelInfo(
        framework="pytorch", name="m", inputs=(TensorSpec(name="x", dtype="float32", shape=(3, 2, 3)),)
    )
    whole = images(7)
    parts = calibration_batches([whole[:5], whole[5:]], three)
    assert [len(one["x"]) for one in parts] == [3, 3, 3]
    np.testing.assert_array_equal(np.concatenate([one["x"] for one in parts])[:7], whole)
    np.testing.assert_array_equal(parts[-1]["x"][1], whole[-1])


def test_no_more_than_the_limit() -> None:
    assert len(calibration_batches(images(50), IMAGES, limit=8)) == 8


def test_lengths_that_differ_are_not_put_together() -> None:
    info = ModelInfo(
        framework="pytorch", name="m", inputs=(TensorSpec(name="ids", dtype="int64", shape=(2, "length")),)
    )
    feeds = [{"ids": np.ones((2, length), np.int64)} for length in (3, 5, 3)]
    assert sorted(one["ids"].shape for one in cut(feeds, info)) == [(2, 3), (2, 3), (2, 5)]
