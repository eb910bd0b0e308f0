import pytest
from hamerspace import Constraints, Fidelity, ModelMetrics
from hamerspace.backends import Candidate
from hamerspace.measure.statistics import Ratio
from hamerspace.search import Trial, choose, verdicts

ORIGINAL = ModelMetrics(size_mb=40, latency_ms=10, accuracy=0.9)


def trial(
    name: str,
    speed: float,
    size_mb: float = 10,
    cosine: float = 1.0,
    accuracy: float | None = None,
    **more: object,
) -> Trial:
    metrics = ModelMetrics(size_mb=size_mb, latency_ms=10 / speed, accuracy=accuracy, **more)  # type: ignore[arg-type]
    return Trial(
        candidate=Candidate(backend="b", technique=name, goal="quantize", description=""),
        metrics=metrics,
        fidelity=Fidelity(cosine=cosine, sqnr_db=30, agreement=None, samples=1, basis=""),
        speedup=Ratio(median=speed, low=speed, high=speed),
    )


def chosen(constraints: Constraints, *trials: Trial) -> str | None:
    found = choose(trials, constraints, ORIGINAL)
    return found and found.candidate.technique


def test_the_fastest_without_constraints() -> None:
    assert chosen(Constraints(), trial("slow", 2), trial("fast", 3), trial("mid", 2.5)) == "fast"


def test_the_smaller_of_equally_fast_ones() -> None:
    assert chosen(Constraints(), trial("large", 3.001, 20), trial("small", 3.0, 10)) == "small"


def test_a_faithful_one_before_a_fast_one() -> None:
    assert (
        chosen(Constraints(), trial("fast", 5, cosine=0.9), trial("faithful", 2, cosine=0.995)) == "faithful"
    )
    assert chosen(Constraints(), trial("far", 5, cosine=0.5), trial("nearer", 2, cosine=0.9)) == "nearer"


def test_measured_accuracy_goes_before_likeness() -> None:
    limits = Constraints(max_accuracy_drop=0.02)
    fast = trial("fast", 5, cosine=0.9, accuracy=0.9)
    assert chosen(limits, fast, trial("faithful", 2, cosine=0.999, accuracy=0.9)) == "fast"


def test_constraints_before_speed() -> None:
    limits = Constraints(target_size_mb=15)
    assert chosen(limits, trial("fast", 9, size_mb=20), trial("small", 1.5, size_mb=12)) == "small"
    limits = Constraints(max_accuracy_drop=0.02)
    assert chosen(limits, trial("worse", 9, accuracy=0.8), trial("good", 1.5, accuracy=0.89)) == "good"


def test_failed_trials_are_no_choice() -> None:
    failed = trial("failed", 9)
    failed.failure = "crashed"
    assert chosen(Constraints(), failed, trial("other", 1.1)) == "other"
    assert chosen(Constraints(), failed) is None


@pytest.mark.parametrize(
    ("interval", "outcome"), [((4, 5), "satisfied"), ((4, 6), "undecided"), ((5.1, 6), "violated")]
)
def test_latency_knows_the_noise(interval: tuple[float, float], outcome: str) -> None:
    found = ModelMetrics(size_mb=1, latency_ms=5, latency_interval_ms=interval)
    assert [one.outcome for one in verdicts(Constraints(max_latency_ms=5), ORIGINAL, found)] == [outcome]


def test_accuracy_that_is_not_measured_is_undecided() -> None:
    found = verdicts(Constraints(max_accuracy_drop=0.5), ORIGINAL, ModelMetrics(size_mb=1, latency_ms=1))
    assert found[0].outcome == "undecided"
    assert "validation" in found[0].reason


def test_a_drop_at_the_limit_is_no_violation() -> None:
    found = ModelMetrics(size_mb=1, latency_ms=1, accuracy=0.9 - 0.02)
    assert verdicts(Constraints(max_accuracy_drop=0.02), ORIGINAL, found)[0].outcome == "satisfied"
