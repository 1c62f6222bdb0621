"""Shared by the tests that wait: for what happens, not for seconds."""

import time
from collections.abc import Callable

LONG = 600
"""Seconds that only a hang takes, however much else the machine has to do."""


def until(happens: Callable[[], bool], told: Callable[[], str] = str) -> None:
    """Wait for something to happen.

    Args:
        happens: Whether it has; may raise where it cannot any more.
        told: What to say if it does not.
    """
    end = time.monotonic() + LONG
    while not happens():
        assert time.monotonic() < end, told()
        time.sleep(0.05)
