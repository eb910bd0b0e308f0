"""What tests of several runtimes share."""

import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def check_threads() -> Callable[..., None]:
    """Run a runner in four threads at once, and compare what each gets with what it gets alone."""

    def check(runner: Any, all_feeds: list[dict[str, Any]]) -> None:
        alone = [runner.run(feeds) for feeds in all_feeds]
        wrong: list[object] = []

        def work(place: int) -> None:
            try:
                for _ in range(200):
                    for name, array in runner.run(all_feeds[place]).items():
                        np.testing.assert_array_equal(array, alone[place][name])
            except BaseException as error:  # noqa: BLE001 - told by the test
                wrong.append(error)

        threads = [threading.Thread(target=work, args=[place]) for place in range(len(all_feeds))]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        assert not wrong

    return check
