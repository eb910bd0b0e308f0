from dataclasses import replace

import numpy as np
import pytest
import torch
from hamerspace import LoadedModel, TensorSpec
from hamerspace.exceptions import ModelInputError


def spec(name: str, *shape: int | str, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def doubled(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    assert len(feeds["x"]) == 2, "the batch is fixed"
    return {"y": feeds["x"] * 2, "total": feeds["x"].sum(1)}


MODEL = LoadedModel(doubled, (spec("x", 2, 3),), (spec("y", 2, 3), spec("total", 2)), "dict")


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 7])
def test_any_number_of_samples_goes_through_a_fixed_batch(samples: int) -> None:
    x = np.random.default_rng(0).normal(size=(samples, 3)).astype("float32")
    found = MODEL(x)
    np.testing.assert_array_equal(found["y"], x * 2)
    np.testing.assert_array_equal(found.total, x.sum(1))
    np.testing.assert_array_equal(found[1], x.sum(1))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_outputs_whose_samples_are_not_the_first_axis(size: int) -> None:
    # The last state of two recurrent layers, [layers, samples, width], and a number for all.
    def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        x = feeds["x"]
        return {"y": x, "h": np.stack([x, -x]), "all": np.zeros(5, np.float32)}

    made = replace(spec("h", 2, size, 3), batch_axis=1)
    model = LoadedModel(run, (spec("x", size, 3),), (spec("y", size, 3), made), "dict")
    for samples in (1, 2, 5):
        x = np.random.default_rng(0).normal(size=(samples, 3)).astype("float32")
        if samples != size:
            with pytest.raises(ModelInputError, match=f"give it exactly {size}"):
                model(x)
            continue
        found = model(x)
        np.testing.assert_array_equal(found.y, x)
        np.testing.assert_array_equal(found.h, np.stack([x, -x]))
        assert found["all"].shape == (5,)
    parts = LoadedModel(
        lambda feeds: {name: one for name, one in run(feeds).items() if name != "all"},
        *(model.inputs, model.outputs),
        "dict",
    )
    for samples in (1, 2, 5):
        x = np.random.default_rng(0).normal(size=(samples, 3)).astype("float32")
        np.testing.assert_array_equal(parts(x).h, np.stack([x, -x]))


def test_outputs_are_of_the_callers_framework() -> None:
    assert isinstance(MODEL(torch.ones(2, 3)).y, torch.Tensor)
    assert isinstance(MODEL(np.ones((2, 3), "float32")).y, np.ndarray)
    forced = LoadedModel(doubled, MODEL.inputs, MODEL.outputs, "tuple", "torch")
    assert all(isinstance(one, torch.Tensor) for one in forced(np.ones((2, 3), "float32")))


def test_inputs_by_name_by_position_and_as_a_dictionary() -> None:
    two = LoadedModel(
        lambda feeds: {"output": feeds["a"] - feeds["b"]},
        (spec("a", "n"), spec("b", "n")),
        (spec("output", "n"),),
    )
    a, b = np.array([3.0], "float32"), np.array([1.0], "float32")
    for found in (two(a, b), two(a, b=b), two(b=b, a=a), two({"a": a, "b": b})):
        np.testing.assert_array_equal(found, [2.0])


def test_half_precision_goes_in_and_bfloat16_too() -> None:
    assert MODEL(torch.ones(2, 3, dtype=torch.bfloat16)).y.dtype == torch.float32
    assert MODEL(np.ones((2, 3), "float64")).y.dtype == np.float32


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ((), {}, "missing"),
        ((np.ones((2, 3)), np.ones(1)), {}, "2 inputs"),
        ((), {"z": np.ones(1)}, "unknown"),
        ((np.ones((2, 3)),), {"x": np.ones((2, 3))}, "twice"),
        ((np.ones((2, 3), "int64"),), {}, "int64"),
        ((np.ones((2, 4)),), {}, r"\[2, 4\]"),
        ((np.ones(2),), {}, r"\[2\]"),
        ((np.ones((0, 3), "float32"),), {}, "no samples"),
    ],
)
def test_inputs_that_do_not_fit(args: tuple[object, ...], kwargs: dict[str, object], said: str) -> None:
    with pytest.raises(ModelInputError, match=said):
        MODEL(*args, **kwargs)


def test_an_unknown_output_is_named() -> None:
    with pytest.raises(AttributeError, match="logits"):
        _ = MODEL(np.ones((2, 3), "float32")).logits


def test_integers_do_not_wrap_and_scalars_stay_scalars() -> None:
    model = LoadedModel(lambda feeds: {"y": feeds["x"]}, (spec("x", 2, dtype="uint8"),), (spec("y", 2),))
    assert model(np.array([0, 255])).dtype == np.uint8
    for wrong in ([300, 1], [-1, 1]):
        with pytest.raises(ModelInputError, match="uint8 does not"):
            model(np.array(wrong))
    scalar = LoadedModel(lambda feeds: {"y": feeds["s"]}, (spec("s"),), (spec("y"),))
    assert scalar(np.float32(2.5)).shape == ()
