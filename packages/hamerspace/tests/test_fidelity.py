import numpy as np
import pytest
from hamerspace.measure.fidelity import accuracy, compare, largest_difference
from hamerspace.measure.statistics import Ratio, Round, interval, wall_medians


def outputs(*arrays: object) -> list[dict[str, np.ndarray]]:
    return [{"output": np.asarray(one, np.float32)} for one in arrays]


def test_the_same_outputs() -> None:
    found = compare(outputs([[1, 2], [3, 4]]), outputs([[1, 2], [3, 4]]), "inputs")
    assert found.cosine == pytest.approx(1)
    assert found.sqnr_db == float("inf")
    assert found.agreement == 1
    assert found.samples == 2


def test_a_case_by_hand() -> None:
    # (3, 4) against (4, 3): cosine 24 / 25; (1, 0) against (0, 1): 0. Signal 26, noise 2 + 2.
    found = compare(outputs([[3, 4], [1, 0]]), outputs([[4, 3], [0, 1]]), "inputs")
    assert found.cosine == pytest.approx(0.48)
    assert found.sqnr_db == pytest.approx(10 * np.log10(26 / 4))
    assert found.agreement == 0


def test_all_outputs_of_a_sample_are_one_vector() -> None:
    a = [{"x": np.array([[3.0]]), "y": np.array([[4.0]])}]
    b = [{"x": np.array([[4.0]]), "y": np.array([[3.0]])}]
    assert compare(a, b, "inputs").cosine == pytest.approx(24 / 25)


def test_samples_along_another_axis_and_outputs_of_all_samples() -> None:
    # y is [samples, 2], h is [1 layer, samples, 2] with the same numbers, and both of each sample are turned.
    y, turned = np.array([[3, 4], [1, 0]], float), np.array([[4, 3], [0, 1]], float)
    wanted, found = [{"y": y, "h": y[None]}], [{"y": turned, "h": turned[None]}]
    assert compare(wanted, found, "inputs", {"h": 1}).cosine == pytest.approx(0.48)
    # A number for all samples counts with each: (3, 4, 1) against (4, 3, 1) is 25 / 26, (1, 0, 1) against
    # (0, 1, 1) a half.
    wanted, found = [{"y": y, "all": np.ones(1)}], [{"y": turned, "all": np.ones(1)}]
    assert compare(wanted, found, "inputs").cosine == pytest.approx((25 / 26 + 0.5) / 2)
    assert compare(wanted, found, "inputs").samples == 2


def test_complex_outputs_are_compared_whole() -> None:
    wanted = [{"y": np.array([[1 + 2j]])}]
    assert compare(wanted, wanted, "inputs").cosine == pytest.approx(1)
    assert compare(wanted, [{"y": np.array([[1 - 2j]])}], "inputs").cosine == pytest.approx((1 - 4) / 5)


def test_zeros_agree_with_zeros_only() -> None:
    assert compare(outputs([[0, 0]]), outputs([[0, 0]]), "inputs").cosine == 1
    assert compare(outputs([[0, 0]]), outputs([[1, 0]]), "inputs").cosine == 0


def test_nan_is_named() -> None:
    with pytest.raises(ValueError, match="NaN or infinite in 1 places"):
        compare(outputs([[1, 2]]), outputs([[1, np.nan]]), "inputs")


def test_infinity_where_the_original_has_it_is_left_out() -> None:
    assert compare(outputs([[1, -np.inf]]), outputs([[1, -np.inf]]), "inputs").cosine == pytest.approx(1)


@pytest.mark.parametrize("other", [[{"output": np.zeros((1, 3))}], [{"other": np.zeros((1, 2))}]])
def test_other_shapes_and_names_are_refused(other: list[dict[str, np.ndarray]]) -> None:
    with pytest.raises(ValueError, match="output 'output'"):
        compare(outputs([[1, 2]]), other, "inputs")


def test_largest_difference_is_relative_to_the_largest_output() -> None:
    assert largest_difference({"y": np.array([10.0, 1.0])}, {"y": np.array([10.0, 2.0])}) == pytest.approx(
        0.1
    )


def test_accuracy_of_classes_and_one_hot() -> None:
    scores = outputs([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    assert accuracy(scores, [np.array([1, 0, 0])]) == pytest.approx(2 / 3)
    assert accuracy(scores, [np.array([[1], [0], [0]])]) == pytest.approx(2 / 3)
    assert accuracy(scores, [np.eye(2)[[1, 0, 0]]]) == pytest.approx(2 / 3)


def test_labels_that_are_no_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="validation_fn"):
        accuracy(outputs([[0.5], [0.2]]), [np.array([0.4, 0.3])])


def test_interval_holds_the_median_of_a_known_sample() -> None:
    sample = np.random.default_rng(1).normal(10, 1, 41)
    low, high = interval(list(sample))
    assert low < np.median(sample) < high
    assert high - low < 2
    assert interval([3.0] * 7) == (3.0, 3.0)


def test_the_interval_covers_the_true_median_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = interval(list(generator.normal(0, 1, 25)), draws=300)
        hits += low <= 0 <= high
    assert 0.88 <= hits / 200 <= 1


def test_ratios_are_of_rounds_side_by_side() -> None:
    # The machine was twice as slow in the second half, and the ratio is not.
    slow, fast = [4.0, 4.0, 4.0, 8.0, 8.0], [2.0, 2.0, 2.0, 4.0, 4.0]
    assert Ratio.of(slow, fast) == Ratio(median=2.0, low=2.0, high=2.0)


def test_medians_of_rounds() -> None:
    rounds = [Round(cpu_s=1, wall_s=(1.0, 2.0, 9.0)), Round(cpu_s=1, wall_s=(3.0,))]
    assert list(wall_medians(rounds)) == [2.0, 3.0]
