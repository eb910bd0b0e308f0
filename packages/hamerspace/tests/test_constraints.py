import math

import pytest
from hamerspace import Constraints, OptimizationGoal
from hamerspace.core.goals import goal_of
from hypothesis import given
from hypothesis import strategies as st


def test_defaults_limit_nothing() -> None:
    constraints = Constraints()
    assert not constraints.has_size_constraint()
    assert not constraints.has_latency_constraint()
    assert not constraints.has_accuracy_constraint()
    assert (constraints.target_hardware, constraints.batch_size, constraints.calibration_samples) == (
        "cpu",
        1,
        100,
    )


def test_limits_are_seen() -> None:
    constraints = Constraints(target_size_mb=10.0, max_latency_ms=50.0, max_accuracy_drop=0.0)
    assert constraints.has_size_constraint()
    assert constraints.has_latency_constraint()
    assert constraints.has_accuracy_constraint()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_size_mb", 0),
        ("target_size_mb", -1.0),
        ("target_size_mb", math.nan),
        ("target_size_mb", "10"),
        ("max_latency_ms", -5),
        ("max_latency_ms", math.inf),
        ("max_accuracy_drop", -0.01),
        ("max_accuracy_drop", 1.5),
        ("max_accuracy_drop", True),
        ("target_hardware", "abacus"),
        ("batch_size", 0),
        ("batch_size", 1.0),
        ("calibration_samples", -3),
    ],
)
def test_what_is_out_of_range_is_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        Constraints(**{name: value})


@given(
    st.builds(
        Constraints,
        target_size_mb=st.none() | st.floats(1e-6, 1e9),
        max_latency_ms=st.none() | st.floats(1e-6, 1e9),
        max_accuracy_drop=st.none() | st.floats(0, 1),
        target_hardware=st.sampled_from(["cpu", "gpu", "cuda", "edge", "arm"]),
        batch_size=st.integers(1, 512),
        calibration_samples=st.integers(1, 10_000),
    )
)
def test_a_dictionary_and_back(constraints: Constraints) -> None:
    assert Constraints.from_dict(constraints.to_dict()) == constraints


def test_unknown_entries_are_refused() -> None:
    with pytest.raises(ValueError, match="max_size"):
        Constraints.from_dict({"max_size": 1})


def test_goals_by_name() -> None:
    assert goal_of("AUTO") is OptimizationGoal.AUTO
    assert goal_of(OptimizationGoal.PRUNE) is OptimizationGoal.PRUNE
    assert OptimizationGoal.QUANTIZE == "quantize"
    with pytest.raises(ValueError, match="may be quantize, prune, distill, auto"):
        goal_of("shrink")
