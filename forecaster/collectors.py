"""What metrics are made of: collectors over whole columns and over what is known at the scrape, and their reference.

`metrics.py` declares each metric through a `Declarer`, which registers it and remembers it for docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.metrics_core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.samples import Exemplar

from forecaster.histogram import Buckets, Example

PREFIX = "forecaster_"


class Declaration(NamedTuple):
    """One metric, as docs/metrics.md lists it."""

    section: str
    name: str
    kind: str
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()


Samples = Iterable[tuple[tuple[str, ...], float]]


class Read:
    """A gauge that is worked out when it is scraped."""

    def __init__(self, name: str, text: str, labels: Sequence[str], read: Callable[[], Samples]) -> None:
        self._name, self._text, self._labels, self._read = name, text, labels, read

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """What the registry checks for doubles."""
        yield GaugeMetricFamily(self._name, self._text, labels=self._labels)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Work it out."""
        family = GaugeMetricFamily(self._name, self._text, labels=self._labels)
        for labels, value in self._read():
            family.add_metric(labels, value)
        yield family


class Histogram:
    """A histogram over numpy bucket counts."""

    def __init__(self, name: str, text: str, labels: Sequence[str], bounds: Sequence[float]) -> None:
        self._name, self._text, self._labels, self._bounds = name, text, labels, bounds
        self._le = [*(f"{float(bound)}" for bound in bounds), "+Inf"]
        self._children: dict[tuple[str, ...], Buckets] = {}
        if not labels:
            self.labels()

    def labels(self, *values: str) -> Buckets:
        """The counts under these label values, made with zeros where there are none yet."""
        return self._children.setdefault(values, Buckets(self._bounds))

    def describe(self) -> Iterator[HistogramMetricFamily]:
        """What the registry checks for doubles."""
        yield HistogramMetricFamily(self._name, self._text, labels=self._labels)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """The counts, each with its newest example."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        # A copy: the worker may declare an input in the middle of a scrape.
        for values, buckets in dict(self._children).items():
            counted = buckets.snapshot()
            rows = zip(self._le, counted.cumulative, counted.examples, strict=True)
            family.add_metric(values, [_bucket(*row) for row in rows], counted.total)
        yield family


def _bucket(le: str, count: int, example: Example | None) -> tuple[str, float] | tuple[str, float, Exemplar]:
    if example is None:
        return le, count
    return le, count, Exemplar(dict(example.labels), example.value, example.time_s)


class Declarer:
    """Makes metrics in a registry and remembers what it made."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self.section = ""
        self.made: list[Declaration] = []

    def counter(self, name: str, text: str, **labels: Iterable[str]) -> Counter:
        """A counter; where all of a single label's values are given, each begins at 0."""
        self._note(name, "counter", tuple(labels), text)
        counter = Counter(PREFIX + name, text, tuple(labels), registry=self._registry)
        if len(labels) == 1:
            for value in next(iter(labels.values())):
                counter.labels(value)
        return counter

    def gauge(self, name: str, text: str) -> Gauge:
        """A gauge that is set."""
        self._note(name, "gauge", (), text)
        return Gauge(PREFIX + name, text, registry=self._registry)

    def read(self, name: str, text: str, labels: tuple[str, ...], read: Callable[[], Samples]) -> None:
        """A gauge that is worked out when it is scraped."""
        self._note(name, "gauge", labels, text)
        self._registry.register(Read(PREFIX + name, text, labels, read))

    def histogram(self, name: str, text: str, bounds: tuple[float, ...], *labels: str) -> Histogram:
        """A histogram; `labels` gives the counts under a set of values."""
        self._note(name, "histogram", labels, text, bounds)
        histogram = Histogram(PREFIX + name, text, labels, bounds)
        self._registry.register(histogram)
        return histogram

    def _note(self, name: str, kind: str, labels: tuple[str, ...], text: str, bounds: tuple[float, ...] = ()) -> None:
        self.made.append(Declaration(self.section, PREFIX + name, kind, labels, text, bounds))


def reference(declarations: Iterable[Declaration]) -> str:
    """docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Written by `python -m forecaster.metrics > docs/metrics.md`; do not edit.",
        "",
        "Served on `/metrics`, as OpenMetrics or as Prometheus text. Every label value that can be known beforehand",
        "is there as 0 from the first scrape. No label names a stream, but for the list of the few worst ones. The",
        "latency histograms name a record in each bucket, as OpenMetrics exemplars: `stream`, `topic`, `partition`,",
        "`offset`. Beside these are the usual `process_*`.",
    ]
    section = ""
    for metric in declarations:
        if metric.section != section:
            section = metric.section
            lines += ["", f"## {section}", "", "| metric | type | labels | meaning |", "|---|---|---|---|"]
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        buckets = f" Buckets: {', '.join(f'{bound:g}' for bound in metric.buckets)}." if metric.buckets else ""
        lines.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help}{buckets} |")
    return "\n".join(lines) + "\n"
