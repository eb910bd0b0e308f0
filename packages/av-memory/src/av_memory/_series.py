"""A curve that grows without end in a bounded amount of memory."""

from array import array

_NS_PER_S = 1e9


class GrowingSeries:
    """Times and byte counts; when full, neighbours are merged in a way that keeps every extreme.

    Each merge takes four consecutive points and keeps the smallest and the largest of them, in order
    of time, so half the points stay and no peak is lost.

    Args:
        capacity: points kept at most; a multiple of four.
    """

    __slots__ = ("_capacity", "_times_ns", "_values")

    def __init__(self, capacity: int = 65536) -> None:
        self._capacity = capacity
        self._times_ns = array("q")
        self._values = array("q")

    def __len__(self) -> int:
        return len(self._values)

    def append(self, time_ns: int, value_bytes: int) -> None:
        """Add a point. The caller holds the lock that orders writers."""
        self._times_ns.append(time_ns)
        self._values.append(value_bytes)
        if len(self._values) >= self._capacity:
            self._halve()

    def _halve(self) -> None:
        times, values = array("q"), array("q")
        for first in range(0, len(self._values), 4):
            group = range(first, min(first + 4, len(self._values)))
            lowest = min(group, key=self._values.__getitem__)
            highest = max(group, key=self._values.__getitem__)
            for index in sorted({lowest, highest}):
                times.append(self._times_ns[index])
                values.append(self._values[index])
        self._times_ns, self._values = times, values

    def points(self, origin_ns: int, bytes_per_unit: float) -> tuple[list[float], list[float]]:
        """Times in seconds since ``origin_ns``, and values in the unit given."""
        # Writers race for the lock only after they have read the clock, so neighbours can be swapped.
        pairs = sorted(zip(self._times_ns, self._values, strict=True))
        return (
            [(time - origin_ns) / _NS_PER_S for time, _ in pairs],
            [value / bytes_per_unit for _, value in pairs],
        )
