"""The smoothed loss of the display and the plots."""

import math


class EMA:
    """Exponential moving average with bias correction (Kingma & Ba 2015, section 3).

    ``mean_t = beta * mean_{t-1} + (1 - beta) * x_t`` from ``mean_0 = 0``, read as ``mean_t / (1 - beta^t)``.
    Values that are not finite are ignored: one of them would hide all later ones.
    """

    def __init__(self, beta: float = 0.9) -> None:
        assert 0 <= beta < 1, beta
        self.beta = beta
        self._mean = 0.0
        self._weight = 0.0  # 1 - beta^t

    def update(self, value: float) -> float:
        """Add ``value`` and return the average; nan before the first finite value."""
        if math.isfinite(value):
            self._mean = self.beta * self._mean + (1 - self.beta) * value
            self._weight = self.beta * self._weight + (1 - self.beta)
        return self._mean / self._weight if self._weight else math.nan
