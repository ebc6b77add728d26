"""How the families of /metrics are made, and a histogram for what is counted token by token."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

PREFIX = "foretoken_"

Family = TypeVar("Family", bound=Collector)

# A time stamp beside every series would make a scrape twice as long.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Families:
    """Makes families under our prefix. Owns the registry, the families and their labels, by name without the prefix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self.by_name: dict[str, Collector] = {}
        self.labels: dict[str, tuple[str, ...]] = {}

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        """A counter; it is exported as `name`_total."""
        return self._kept(name, Counter(PREFIX + name, text, labels, registry=self.registry), labels)

    def gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        """A gauge."""
        return self._kept(name, Gauge(PREFIX + name, text, labels, registry=self.registry), labels)

    def histogram(self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        """A histogram with these upper bounds."""
        histogram = Histogram(PREFIX + name, text, labels, buckets=buckets, registry=self.registry)
        return self._kept(name, histogram, labels)

    def weighted_histogram(self, name: str, text: str, buckets: Sequence[float]) -> WeightedHistogram:
        """A histogram without labels in which one observation may count several times."""
        histogram = self._kept(name, WeightedHistogram(PREFIX + name, text, buckets), ())
        self.registry.register(histogram)
        return histogram

    def _kept(self, name: str, family: Family, labels: Sequence[str]) -> Family:
        self.by_name[name], self.labels[name] = family, tuple(labels)
        return family


class WeightedHistogram(Collector):
    """Counts n equal observations in one go. Owns its counts; for one thread."""

    def __init__(self, name: str, text: str, buckets: Sequence[float]) -> None:
        self._name, self._text = name, text
        self._bounds = tuple(buckets)
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """`value` was seen so many times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def collect(self) -> Iterable[Metric]:
        """The family as it stands."""
        bounds = [*map(str, self._bounds), "+Inf"]
        family = HistogramMetricFamily(self._name, self._text)
        family.add_metric((), list(zip(bounds, map(float, accumulate(self._counts)), strict=True)), self._sum)
        return [family]
