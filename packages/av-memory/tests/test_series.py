"""A curve stays small and loses no extreme."""

from av_memory._series import GrowingSeries
from hypothesis import given
from hypothesis import strategies as st


@given(st.lists(st.integers(0, 2**50), min_size=1, max_size=300))
def test_extremes_and_order_survive_and_size_is_bounded(values: list[int]):
    series = GrowingSeries(capacity=16)
    for time, value in enumerate(values):
        series.append(time, value)
        assert len(series) < 16
    times, kept = series.points(0, 1.0)
    assert times == sorted(times)
    assert max(kept) == max(values)
    assert min(kept) == min(values)
    assert all(values[round(time * 1e9)] == value for time, value in zip(times, kept, strict=True))
    assert kept[-1] == values[-1] or len(values) >= 16


def test_a_writer_that_interrupts_a_merge_loses_and_mixes_up_nothing():
    class Interrupting(GrowingSeries):
        def _halve(self) -> None:
            super().append(100, 10_000)  # as a signal handler does
            super()._halve()

    series = Interrupting(capacity=16)
    for time in range(200):
        series.append(time, 100 * time)
        assert len(series) <= 16
    times, values = series.points(0, 1.0)
    assert all(round(t * 1e9) * 100 == v for t, v in zip(times, values, strict=True))
