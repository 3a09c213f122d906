"""The budget: wall-clock seconds of training, counted from the first batch."""

import time
from collections.abc import Callable


class Budget:
    """A stopwatch with an end. It does not run before `start`."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._now = now
        self._started: float | None = None

    def start(self, at: float | None = None) -> None:
        """Start the clock, at a reading of the same monotonic clock when given; a second start changes nothing."""
        if self._started is None:
            self._started = self._now() if at is None else at

    @property
    def started(self) -> float | None:
        """The clock's reading at the start, None before it."""
        return self._started

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start; 0.0 before it."""
        return 0.0 if self._started is None else self._now() - self._started

    @property
    def progress(self) -> float:
        """elapsed_s / seconds, in [0, 1]."""
        return min(self.elapsed_s / self.seconds, 1.0)

    @property
    def expired(self) -> bool:
        """Whether the budget is spent."""
        return self.elapsed_s >= self.seconds
