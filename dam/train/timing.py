"""Where the time of a run goes, how fast it draws, and when it will end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import torch

PARTS = ("rollout", "reward", "evaluation", "training")  # the last is all else: passes, updates, data, checkpoints


class Timing:
    """Of one process; not saved, so that a resumed run begins anew.

    Args:
        wait: until what was asked for is done: of a GPU, whose work goes on behind a call.
        clock: seconds.
        parts: what time is spent on; the last is all that is none of the others.
        drawn: what rollouts draw, whose number is counted.
    """

    def __init__(
        self,
        wait: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
        parts: Sequence[str] = PARTS,
        drawn: str = "tokens",
    ):
        self._wait, self._clock, self._parts, self._unit = wait, clock, tuple(parts), drawn
        self.clear()

    def clear(self) -> None:
        """No run."""
        self._begun: tuple[int, float] | None = None  # step and time
        self._since = 0.0  # the last `take`
        self._drawn = 0
        self._spent = dict.fromkeys(self._parts, 0.0)
        self._open: list[str] = []
        self._mark = 0.0  # up to which time is accounted for

    def begin(self, step: int) -> None:
        """A run begins at that step, unless it has begun."""
        if self._begun is None:
            now = self._clock()
            self._begun, self._since, self._mark = (step, now), now, now

    def _account(self) -> None:
        """Time since the mark was spent on the innermost part that is open, or else on training."""
        if self._begun is None:
            return
        now = self._clock()
        self._spent[self._open[-1] if self._open else self._parts[-1]] += now - self._mark
        self._mark = now

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Context manager: time is spent on one of the parts, less what parts within it take."""
        self._wait()
        self._account()
        self._open.append(name)
        try:
            yield
        finally:
            self._wait()
            self._account()
            self._open.pop()

    def drew(self, count: int) -> None:
        """So much was drawn by rollouts in training: of tokens the positions that were filled in."""
        self._drawn += count

    def take(self, step: int, max_steps: int) -> dict[str, float]:
        """Figures since the last call, for the log; none where no time has passed.

        Returns:
            time/<part>_share: of the time since the last call, in [0, 1]; they add up to 1. <drawn>_per_second: in
            training, per second of that time, whatever it was spent on. time/eta_seconds: until max_steps, at the pace
            of the run so far.
        """
        if self._begun is None:
            return {}
        self._account()
        passed = self._mark - self._since
        if passed <= 0:
            return {}
        told = {f"time/{name}_share": spent / passed for name, spent in self._spent.items()}
        told[f"{self._unit}_per_second"] = self._drawn / passed
        first, start = self._begun
        if step > first:
            told["time/eta_seconds"] = (self._mark - start) / (step - first) * (max_steps - step)
        self._since, self._drawn, self._spent = self._mark, 0, dict.fromkeys(self._parts, 0.0)
        return told


def waiter(device: torch.device) -> Callable[[], object]:
    """What waits for the work of a device."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None
