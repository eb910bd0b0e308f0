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

    __slots__ = ("_capacity", "_halving", "_points")

    def __init__(self, capacity: int = 65536) -> None:
        self._capacity = capacity
        # Time, value, time, value ...: what interrupts the program between two operations, such as a
        # signal handler that adds points of its own, finds no time without its value.
        self._points = array("q")
        self._halving = False

    def __len__(self) -> int:
        return len(self._points) // 2

    def append(self, time_ns: int, value_bytes: int) -> None:
        """Add a point. The caller holds the lock that orders writers, which its thread may take again."""
        self._points.extend((time_ns, value_bytes))
        if len(self._points) >= 2 * self._capacity and not self._halving:
            self._halving = True
            try:
                self._halve()
            finally:
                self._halving = False

    def _halve(self) -> None:
        kept = array("q")
        full = len(self._points)
        times, values = self._points[0:full:2], self._points[1:full:2]
        for first in range(0, len(values), 4):
            group = range(first, min(first + 4, len(values)))
            lowest = min(group, key=values.__getitem__)
            highest = max(group, key=values.__getitem__)
            for index in sorted({lowest, highest}):
                kept.extend((times[index], values[index]))
        self._points[:full] = kept  # what was added meanwhile stays behind it

    def points(self, origin_ns: int, bytes_per_unit: float) -> tuple[list[float], list[float]]:
        """Times in seconds since ``origin_ns``, and values in the unit given."""
        # Writers race for the lock only after they have read the clock, so neighbours can be swapped.
        points = self._points[:]
        pairs = sorted(zip(points[0::2], points[1::2], strict=True))
        return (
            [(time - origin_ns) / _NS_PER_S for time, _ in pairs],
            [value / bytes_per_unit for _, value in pairs],
        )
