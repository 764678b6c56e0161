"""What the dashboard shows: rows of panels, each with its queries and what to do when it looks bad.

`make.py` turns this into Grafana's JSON. Metrics are declared in forecaster/metrics.py; tests/deploy holds that
every name here is one of them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

MINE = 'job=~"$job", instance=~"$instance"'
RATE = "$__rate_interval"
# Who is on top at the end of the picture is drawn over all of it: else each moment adds lines of its own.
LAST = " @ end()"


class Query(NamedTuple):
    """PromQL and the name of its lines; `right` puts them on an axis of their own."""

    expr: str
    legend: str = ""
    exemplars: bool = False
    right: str = ""  # the unit there


class Panel(NamedTuple):
    """One picture. `alert` is the runbook section that belongs to it."""

    title: str
    do: str
    queries: tuple[Query, ...]
    unit: str = "short"
    width: int = 8
    height: int = 7
    kind: Literal["lines", "number", "table"] = "lines"
    alert: str = ""
    # Colours from these values on, green below; `worse` says on which side red is.
    amber: float | None = None
    red: float | None = None
    worse: Literal["above", "below"] = "above"
    words: tuple[tuple[float, str], ...] = ()
    low: float | None = None
    high: float | None = None
    line: tuple[float, str] | None = None  # a horizontal one to compare with, and its name
    decimals: int | None = None


class Row(NamedTuple):
    """A heading and what stands under it."""

    title: str
    panels: tuple[Panel, ...]


def total(name: str, by: str = "", more: str = "", at: str = "") -> str:
    """The rate of a counter, summed over instances; `at` a moment of its own."""
    chosen = f"{MINE}, {more}" if more else MINE
    return f"sum{f' by ({by})' if by else ''} (rate(forecaster_{name}{{{chosen}}}[{RATE}]{at}))"


def gauge(over: str, name: str, by: str = "", at: str = "") -> str:
    """A gauge over instances: `sum`, `max`, `min` of it; `at` a moment of its own."""
    return f"{over}{f' by ({by})' if by else ''} (forecaster_{name}{{{MINE}}}{at})"


def quantile(level: float, name: str) -> str:
    """A quantile of a histogram; no sample, and not NaN, where nothing was counted."""
    return f"histogram_quantile({level}, {total(f'{name}_bucket', 'le')}) >= 0"


def spread(name: str, *, exemplars: bool = False) -> tuple[Query, ...]:
    """Median and tail of a histogram; the tail's exemplars name the records."""
    return (
        Query(quantile(0.5, name), "p50"),
        Query(quantile(0.95, name), "p95"),
        Query(quantile(0.99, name), "p99", exemplars),
    )


def mean(name: str, by: str = "") -> str:
    """What a histogram's values are on average."""
    return ratio(total(f"{name}_sum", by), total(f"{name}_count", by))


def ratio(part: str, whole: str) -> str:
    """One rate over another; no sample, and not NaN, where there is nothing."""
    return f"{part} / ({whole} > 0)"


def reasons(at: str = "") -> str:
    """Dead letters by reason."""
    return total("dead_letters_total", "reason", at=at)


def worst(at: str = "") -> str:
    """The listed streams' errors."""
    return gauge("max", "worst_stream_error_ratio", "input, topic, partition, stream", at)


SETTLED = total("interval_outcomes_total", "level")
INSIDE = total("interval_outcomes_total", "level", 'outcome="inside"')
CALLED = total("direction_outcomes_total", "horizon")
HIT = total("direction_outcomes_total", "horizon", 'outcome="hit"')

ROWS = (
    Row(
        "Up and keeping up",
        (
            Panel(
                "Ready",
                "When it says NO, ask /readyz of the instance which check fails.",
                (Query(gauge("min", "ready")),),
                width=4,
                height=4,
                kind="number",
                alert="NotReady",
                red=1,
                worse="below",
                words=((0, "NO"), (1, "yes")),
            ),
            Panel(
                "Oldest unanswered record",
                "Above a minute, more comes than is answered: look at Traffic, add instances.",
                (Query(gauge("max", "consumer_lag_seconds")),),
                unit="s",
                width=4,
                height=4,
                kind="number",
                alert="LagSecondsHigh",
                amber=10,
                red=60,
            ),
            Panel(
                "Forecasts",
                "Zero while records come in is a stall: see the runbook.",
                (Query(total("end_to_end_seconds_count")),),
                unit="suffix:/s",
                width=4,
                height=4,
                kind="number",
                alert="Stalled",
                decimals=1,
            ),
            Panel(
                "p99 record to forecast",
                "Above 0.25 s, see in Latency whether the step or the commit takes the time.",
                (Query(quantile(0.99, "end_to_end_seconds")),),
                unit="s",
                width=4,
                height=4,
                kind="number",
                alert="LatencyBudgetBurn",
                amber=0.1,
                red=0.25,
            ),
            Panel(
                "Streams",
                "Near the limit (State, below) raise streams_max or find out who invents stream ids.",
                (Query(gauge("sum", "streams")),),
                width=4,
                height=4,
                kind="number",
                alert="StateNearLimit",
            ),
            Panel(
                "Oldest unwritten state",
                "Above two minutes a restart replays as much: look for commits that fail.",
                (Query(gauge("max", "flush_age_seconds")),),
                unit="s",
                width=4,
                height=4,
                kind="number",
                alert="FlushOld",
                amber=60,
                red=120,
            ),
        ),
    ),
    Row(
        "Traffic",
        (
            Panel(
                "Records in, by topic",
                "A topic that falls to zero has lost its producer.",
                (Query(total("records_total", "topic"), "{{topic}}"),),
                unit="suffix:/s",
                alert="StreamsStale",
                low=0,
            ),
            Panel(
                "Signals out, by direction",
                "Only one direction for long means a trend, or a threshold that is too low.",
                (Query(total("signals_total", "direction"), "{{direction}}"),),
                unit="suffix:/s",
                low=0,
            ),
            Panel(
                "Dead letters, and the three most frequent reasons",
                "More than one in a hundred records: read a letter, its header says what is wrong with the record.",
                (
                    Query(total("dead_letters_total"), "all"),
                    Query(f"{reasons()} and topk(3, {reasons(LAST)})", "{{reason}}"),
                ),
                unit="suffix:/s",
                alert="DeadLettersHigh",
                low=0,
            ),
        ),
    ),
    Row(
        "Latency",
        (
            Panel(
                "Record's timestamp to its committed forecast",
                "When the tail rises, click a diamond: it names a stream and an offset.",
                spread("end_to_end_seconds", exemplars=True),
                unit="s",
                alert="LatencyBudgetBurn",
                low=0,
                line=(0.25, "objective for 99 %"),
            ),
            Panel(
                "Step and commit, p99",
                "A step that grows wants a smaller network or a GPU, a commit that grows wants a faster broker.",
                (
                    Query(quantile(0.99, "step_seconds"), "step", exemplars=True),
                    Query(quantile(0.99, "commit_seconds"), "commit", exemplars=True),
                ),
                unit="s",
                alert="LatencyBudgetBurn",
                low=0,
            ),
            Panel(
                "Share of the time, and records in a batch",
                "Shares that add up to 100 % are the limit of one instance: start another.",
                (
                    Query(total("step_busy_seconds_total"), "stepping"),
                    Query(total("commit_seconds_sum"), "committing"),
                    Query(mean("batch_records"), "records in a batch", right="short"),
                ),
                unit="percentunit",
                alert="LagSecondsHigh",
                low=0,
            ),
        ),
    ),
    Row(
        "Kafka",
        (
            Panel(
                "Records that wait, by topic",
                "Growing for minutes: more instances, up to the number of partitions.",
                (Query(gauge("sum", "consumer_lag_records", "topic"), "{{topic}}"),),
                alert="LagSecondsHigh",
                low=0,
            ),
            Panel(
                "Transactions, by outcome",
                "Aborted ones beyond a rebalance: the log says why, the broker's log knows more.",
                (Query(total("transactions_total", "outcome"), "{{outcome}}"),),
                unit="suffix:/s",
                alert="Errors",
                low=0,
            ),
            Panel(
                "Errors by stage, and rebalances",
                "Errors that do not end: the log says why; rebalances that do not: a member comes and goes.",
                (
                    Query(total("errors_total", "stage"), "{{stage}}"),
                    Query(total("rebalances_total"), "rebalances"),
                ),
                unit="suffix:/s",
                alert="Errors",
                low=0,
            ),
        ),
    ),
    Row(
        "Forecast quality",
        (
            Panel(
                "Skill against the last value, by horizon",
                "Below the line the last value would have been better: do not act on that horizon, train again.",
                (
                    Query(
                        "1 - "
                        + ratio(
                            total("absolute_error_total", "horizon"), total("naive_absolute_error_total", "horizon")
                        ),
                        "{{horizon}} ahead",
                    ),
                ),
                unit="percentunit",
                alert="WorseThanNaive",
                line=(0, "the last value"),
            ),
            Panel(
                "Interval coverage minus nominal, by level",
                "Far from the line for hours: the intervals say too much or too little, see the runbook.",
                (
                    Query(
                        f"{ratio(INSIDE, SETTLED)} - on (level) {gauge('max', 'interval_nominal_ratio', 'level')}",
                        "level {{level}}",
                    ),
                ),
                unit="percentunit",
                alert="Miscalibrated",
                line=(0, "as promised"),
            ),
            Panel(
                "Directions that came true, and how many were called",
                "Below half with many called: raise the signal's threshold, or stop acting on it.",
                (
                    Query(ratio(HIT, CALLED), "{{horizon}} ahead"),
                    Query(total("direction_outcomes_total"), "called", right="suffix:/s"),
                ),
                unit="percentunit",
                low=0,
                high=1,
                line=(0.5, "a coin"),
            ),
            Panel(
                "Error in the stream's usual change, by horizon",
                "Rising for all horizons at once: the data have changed, see Data and drift.",
                (Query(mean("scaled_error_ratio", "horizon"), "{{horizon}} ahead"),),
                alert="WorseThanNaive",
                width=12,
                low=0,
            ),
            Panel(
                "Whom the forecasts listen to",
                "Mostly the last value: nothing better was found; training on longer history may help.",
                (
                    Query(
                        f"avg by (expert) (forecaster_expert_weight{{{MINE}}})",
                        "{{expert}}",
                    ),
                ),
                unit="percentunit",
                width=12,
                low=0,
                high=1,
            ),
        ),
    ),
    Row(
        "Data and drift",
        (
            Panel(
                "Event time to poll",
                "Rising alone: the records reach Kafka late, look at the producers.",
                spread("event_delay_seconds"),
                unit="s",
                low=0,
            ),
            Panel(
                "How far inputs move, in the stream's usual change",
                "Well above 0.8 on average: the inputs no longer are what they were; look at a few records.",
                (
                    Query(mean("input_zscore_abs"), "mean"),
                    Query(quantile(0.99, "input_zscore_abs"), "p99"),
                ),
                alert="DriftWidespread",
                low=0,
                line=(0.8, "steady streams' mean"),
            ),
            Panel(
                "Streams that drift, are stale, or are split",
                "Many at once: one cause upstream (a new unit, a dead source, records keyed by something else).",
                (
                    Query(gauge("sum", "streams_drifting"), "drifting"),
                    Query(gauge("sum", "streams_stale"), "stale"),
                    Query(gauge("sum", "streams_split_total"), "split over partitions"),
                ),
                alert="DriftWidespread",
                low=0,
            ),
        ),
    ),
    Row(
        "Worst streams",
        (
            Panel(
                "The worst now, by mean error in the stream's usual change",
                "Look at these streams' records first: stuck, in another unit, or two sources under one id.",
                (Query(f"round(topk(10, {worst()}), 0.01)"),),
                width=12,
                height=9,
                kind="table",
                alert="WorseThanNaive",
                decimals=2,
            ),
            Panel(
                "The five worst, over time",
                "One line that leaves the others is that stream's own trouble; all together is everyone's.",
                (Query(f"{worst()} and topk(5, {worst(LAST)})", "{{stream}}"),),
                width=12,
                height=9,
                alert="WorseThanNaive",
                low=0,
            ),
        ),
    ),
    Row(
        "State, process, device",
        (
            Panel(
                "Streams, and how many fit",
                "Above 90 % the longest idle ones are about to be dropped: raise streams_max.",
                (Query(gauge("sum", "streams"), "held"), Query(gauge("sum", "streams_max"), "room for")),
                alert="StateNearLimit",
                width=6,
                low=0,
            ),
            Panel(
                "Streams that lost their place, by reason",
                "Many by capacity, all the time: more are active than the device table holds, raise it.",
                (Query(total("streams_evicted_total", "reason"), "{{reason}}"),),
                unit="suffix:/s",
                alert="StateNearLimit",
                width=6,
                low=0,
            ),
            Panel(
                "Memory",
                "Growth without new streams is a leak: please report it.",
                (
                    Query(f"sum (process_resident_memory_bytes{{{MINE}}})", "process"),
                    Query(gauge("sum", "state_bytes"), "state on the device"),
                ),
                unit="bytes",
                width=6,
                low=0,
            ),
            Panel(
                "Processor, and traces of the step",
                "One core is an instance's limit; traces that grow with no version of other sizes are a defect.",
                (
                    Query(f"sum (rate(process_cpu_seconds_total{{{MINE}}}[{RATE}]))", "cores"),
                    Query(gauge("sum", "traces_total"), "traces", right="short"),
                ),
                width=6,
                alert="LagSecondsHigh",
                low=0,
            ),
            Panel(
                "Models in use",
                "An old version here after a swap: the new model was refused, the log says why.",
                (Query(gauge("max", "model_info", "instance, input, model, version, device")),),
                width=18,
                height=6,
                kind="table",
            ),
            Panel(
                "Models, by what became of them",
                "A refused one is damaged or another network: the log says which, the old one stays in use.",
                (Query(gauge("sum", "model_swaps_total", "outcome"), "{{outcome}}"),),
                width=6,
                height=6,
                low=0,
            ),
        ),
    ),
)
