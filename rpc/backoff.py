"""Retry schedules as pure sequences of waits. Nothing here sleeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator


def exponential(first_s: float, max_s: float, factor: float = 2.0) -> Iterator[float]:
    """Waits that grow by a factor up to a bound, without end.

    Args:
        first_s: The first wait in seconds, above 0.
        max_s: No wait is longer; at least `first_s`.
        factor: Each wait is this many times the one before; at least 1.

    Yields:
        Seconds.

    Raises:
        ValueError: An argument is out of its range; raised at the call.
    """
    if not 0 < first_s <= max_s:
        raise ValueError(f"first_s must be above 0 and at most max_s={max_s}, not {first_s}")
    if factor < 1:
        raise ValueError(f"factor must be at least 1, not {factor}")

    def waits() -> Iterator[float]:
        wait_s = first_s
        while True:
            yield wait_s
            wait_s = min(wait_s * factor, max_s)

    return waits()


def jittered(waits: Iterator[float], draw: Callable[[], float]) -> Iterator[float]:
    """Spread waits, so that many callers do not try again at the same time.

    Args:
        waits: Seconds each.
        draw: Returns a number in [0, 1), as `random.random` does.

    Yields:
        For each wait something between its half and its whole, in seconds.

    Source: "equal jitter" of Brooker, "Exponential Backoff And Jitter", AWS
    Architecture Blog, 2015; it keeps a floor, which full jitter does not.
    """
    for wait_s in waits:
        yield wait_s * (0.5 + draw() / 2)
