"""How many drafted tokens pay: what a call costs by its number of nodes, against what their chances promise."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from elision.ir.drafting.proposal import Array

SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)  # nodes for which a call is measured
_LEAST = 1.02  # an expected gain below this is not worth its risk


class Policy:
    """``measure``: gives the seconds of calls over `SIZES` nodes; it is called once, by `ready` or when they are first needed."""

    def __init__(self, measure: Callable[[], Array]) -> None:
        self._measure, self._times, self.lock = measure, np.zeros(0), threading.Lock()
        self.overhead = 0.0  # seconds that drafting and learning add to a round
        self._drift = np.ones(2)  # what a call without and with drafts takes now, of what it took when it was measured

    def seconds(self, n: int) -> float:
        """A call over n nodes, by the line between the sizes that were measured and on beyond them."""
        return float(self._of(np.array([n]))[0])

    def ready(self) -> None:
        """Measure, if that has not been done."""
        if len(self._times):
            return
        with self.lock:
            if not len(self._times):
                # A larger call never costs less, and noise only ever adds: what a larger one took is enough.
                self._times = np.minimum.accumulate(self._measure()[::-1])[::-1]

    def _of(self, n: Array) -> Array:
        self.ready()
        slope = (self._times[-1] - self._times[-5]) / (SIZES[-1] - SIZES[-5])
        found: Array = np.interp(n, SIZES, self._times) + np.maximum(n - SIZES[-1], 0) * slope
        return found

    def _now(self, rows: int, n: Array) -> Array:
        """Seconds of calls over ``n`` nodes for ``rows`` sequences, as they are now."""
        found: Array = self._of(n) * self._drift[(n > rows).astype(int)]
        return found

    def nodes(self, chances: Array, rows: int) -> int:
        """How many of the drafted nodes of a round over ``rows`` sequences to run, given the chance of each, largest first: the
        number with the most tokens per second, or 0 if that is not clearly more than without them."""
        if not len(chances):
            return 0
        times = self._now(rows, np.arange(rows, rows + len(chances) + 1))
        rate = (rows + np.cumsum(chances)) / (times[1:] + self.overhead)
        best = int(rate.argmax())
        return best + 1 if rate[best] > _LEAST * rows / times[0] else 0

    def levels(self, chance: float, step: float, rows: int, most: int, width: float = 1.0) -> tuple[int, float]:
        """How many levels to draft by a model, at most ``most``, and the gain that is expected of it (tokens per second, over
        none): each level takes ``step`` seconds and adds ``width`` nodes a row, one of which is accepted with ``chance`` if its
        parent is."""
        n = np.arange(most + 1)
        times = self._now(rows, rows * (1 + n * width)) + n * step
        gain = np.cumsum(chance**n) * times[0] / times
        best = int(gain.argmax())
        return best, float(gain[best])

    def another(self, chances: Sequence[float], next: float, step: float, rows: int, width: float = 1.0) -> bool:
        """Whether one more level pays after those whose nodes have been accepted with ``chances``, if its own is ``next``."""
        n = len(chances)
        before, after = self._now(rows, rows * (1 + np.array([n, n + 1]) * width)) + np.array([n, n + 1]) * step
        return bool(next * before > (1 + sum(chances)) * (after - before))

    def called(self, rows: int, n: int, seconds: float) -> None:
        """A call over n nodes for ``rows`` sequences took so long: contexts grow, and the machine is not always as free."""
        which = int(n > rows)
        self._drift[which] += 0.05 * (min(seconds / self.seconds(n), 1.5 * self._drift[which]) - self._drift[which])

    def pays(self, gain: float) -> bool:
        """Whether an expected gain is worth its risk."""
        return gain > _LEAST

    def took(self, seconds: float) -> None:
        """A round spent so long on drafting and learning."""
        self.overhead += 0.1 * (min(seconds, 10 * self.overhead + 1e-3) - self.overhead)  # a pause is not what a round costs


class Always(Policy):
    """Run the best ``most`` nodes of every row, whatever they cost: for tests and for machines whose cost is known."""

    def __init__(self, most: int) -> None:
        super().__init__(lambda: np.ones(len(SIZES)))
        self._most = most

    def nodes(self, chances: Array, rows: int) -> int:
        return min(len(chances), self._most * rows)

    def levels(self, chance: float, step: float, rows: int, most: int, width: float = 1.0) -> tuple[int, float]:
        return min(most, self._most), 2 * _LEAST

    def another(self, chances: Sequence[float], next: float, step: float, rows: int, width: float = 1.0) -> bool:
        return True
