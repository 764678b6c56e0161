"""`forecaster train`: fit an input's shared weights on history, say what came of it, put them to use."""

from __future__ import annotations

import argparse
import datetime as dt
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import orjson

from forecaster import log as logs
from forecaster.commands.bounds import bound
from forecaster.config import Config, InputConfig, load_config
from forecaster.errors import Fatal, InvalidConfig, Reason
from forecaster.history import histories, read_files
from forecaster.model.columns import StreamHistory
from forecaster.networks import model_directory, network_spec
from forecaster.records import MemoryRecord, Record

if TYPE_CHECKING:
    # For their types only: training brings TensorFlow.
    from forecaster.evaluation import Evaluation
    from forecaster.model.training import Progress, TrainingReport, TrainOptions


def run(arguments: argparse.Namespace) -> int:
    """Train, report on standard output, save the version and (unless told otherwise) make it the input's champion."""
    config = load_config(arguments.config, arguments.overrides)
    logs.configure(config.log.format, config.log.level)
    input_config = config.input(arguments.input)
    directory = model_directory(input_config)
    records = _records(arguments, config, input_config)

    from forecaster import progress  # noqa: PLC0415 - after a wrong flag or config is told

    refused: Counter[Reason] = Counter()
    with progress.bars() as bars:
        streams = histories(_counted(records, bars.counter("read")), input_config, refused)
        if not any(len(stream.time_s) > 1 for stream in streams):
            raise Fatal(f"nothing to train on: {_refused(refused) or 'no records'}")

        from forecaster.model import registry  # noqa: PLC0415
        from forecaster.model.seasons import find_seasons  # noqa: PLC0415
        from forecaster.model.training import train  # noqa: PLC0415
        from forecaster.prequential import held_out  # noqa: PLC0415 - TensorFlow

        def watch(at: Progress) -> None:
            note = f"loss {at.loss:.4f}"
            if math.isfinite(at.held_out_loss):
                note += f", held out {at.held_out_loss:.4f}"
            bars.task("train", at.step, at.steps_max, note)

        bars.task("train", 0, None, "compiling")
        options = _options(config, arguments.seconds)
        seasons = find_seasons(streams) if input_config.seasons == "auto" else None
        model, report = train(network_spec(input_config, seasons), streams, options, watch)
        bars.task("score", 0, None)
        holdout, threshold = config.training.holdout, input_config.signal.threshold
        evaluation = held_out(model, streams, holdout, threshold, config.device.device)
    scores = _scores(evaluation, input_config)
    parent = registry.champion(directory)
    kept = {"history": _history(streams, refused), "held_out": scores, "seasons": list(model.spec.seasons)}
    model = msgspec.structs.replace(model, parent=parent, training=model.training | kept)
    path = registry.save(directory, model, promote=arguments.promote)
    if arguments.json:
        document = {"version": model.version, "path": str(path), "report": msgspec.to_builtins(report)} | kept
        sys.stdout.write(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode() + "\n")
    else:
        sys.stdout.write("\n".join(_lines(report, options, kept, str(path))) + "\n")
    return 0


def _options(config: Config, seconds_max: float | None) -> TrainOptions:
    from forecaster.model.training import TrainOptions  # noqa: PLC0415 - TensorFlow

    given = msgspec.structs.asdict(config.training)
    return TrainOptions(batch=given.pop("batch_streams"), seconds_max=seconds_max, **given)


# ---------------------------------------------------------------------- the records


def _records(arguments: argparse.Namespace, config: Config, input_config: InputConfig) -> Iterator[Record]:
    if bool(arguments.files) == arguments.from_kafka:
        raise InvalidConfig("train: expected either files or --from-kafka")
    if not arguments.from_kafka:
        if arguments.start or arguments.end:
            raise InvalidConfig("train: --from and --to go with --from-kafka")
        return read_files(arguments.files, input_config, stream=arguments.stream)
    if input_config.pattern is not None:
        raise InvalidConfig(f"train: [[inputs]] {input_config.name} has a pattern: --from-kafka needs topics by name")
    return _from_kafka(config, input_config, arguments.start, arguments.end)


def _from_kafka(config: Config, input_config: InputConfig, start: str | None, end: str | None) -> Iterator[Record]:
    from forecaster.kafka import describe_topics, read_range  # noqa: PLC0415 - files need no client

    topics = describe_topics(config.kafka, input_config.topics)
    for topic in input_config.topics:
        partitions = topics[topic].partitions
        first, last = bound("--from", start, partitions), bound("--to", end, partitions)
        for batch in read_range(config.kafka, topic, start=first, end=last):
            # Copies without the client's bookkeeping: a history is as long as somebody likes.
            for each in batch:
                yield MemoryRecord(each.topic, each.partition, each.offset, each.timestamp, each.key, each.value)


def _counted(records: Iterator[Record], more: Any) -> Iterator[Record]:
    every = 1_000  # a bar that moves for each record would cost more than reading it
    count = 0
    for count, record in enumerate(records, 1):
        if count % every == 0:
            more(every)
        yield record
    more(count % every)


# ---------------------------------------------------------------------- the report


def _history(streams: Sequence[StreamHistory], refused: Counter[Reason]) -> dict[str, Any]:
    """What was learned from."""
    begun = [stream for stream in streams if len(stream.time_s)]
    return {
        "streams": len(begun),
        "records": sum(len(stream.time_s) for stream in begun),
        "from": _iso(min(stream.time_s[0] for stream in begun)),
        "to": _iso(max(stream.time_s[-1] for stream in begun)),
        "refused": {str(reason): count for reason, count in refused.items()},
    }


def _iso(time_s: float) -> str:
    return dt.datetime.fromtimestamp(float(time_s), dt.UTC).isoformat(timespec="seconds")


def _scores(evaluation: Evaluation, config: InputConfig) -> list[dict[str, Any]]:
    """The held-out time by target and horizon; None where nothing could be scored."""
    from forecaster.progress import median_ratio  # noqa: PLC0415

    names = {stream for stream, _, _ in evaluation.tallies}
    scores = []
    for target, name in enumerate(config.targets):
        for horizon, steps in enumerate(config.horizons):
            tallies = [evaluation.tally(stream, target, horizon) for stream in names]
            ratio = median_ratio([tally.error_ratio for tally in tallies])
            called = sum(tally.directions for tally in tallies)
            scores.append(
                {
                    "target": name,
                    "steps": steps,
                    "forecasts": round(sum(tally.count for tally in tallies)),
                    "error_ratio": ratio if math.isfinite(ratio) else None,
                    "streams_better": sum(tally.error_ratio < 1.0 for tally in tallies),
                    "streams": sum(math.isfinite(tally.error_ratio) for tally in tallies),
                    "directions_called": round(called),
                    "hit_rate": sum(tally.hits for tally in tallies) / called if called else None,
                }
            )
    return scores


def _lines(report: TrainingReport, options: TrainOptions, kept: dict[str, Any], path: str) -> Iterator[str]:
    history, share = kept["history"], f"the last {100 * options.holdout:.0f} % of each stream's time"
    yield (
        f"history   {history['records']:,} records of {history['streams']:,} streams, "
        f"{history['from']} to {history['to']}"
    )
    if history["refused"]:
        yield f"left out  {_refused(Counter(history['refused']))}"
    yield f"seasons   {', '.join(map(str, kept['seasons'])) or 'none'} (records)"
    yield f"trained   {report.steps:,} steps, {report.epochs:,} epochs, {report.seconds:.0f} s"
    yield (
        f"loss      {report.loss:.4f} at the end; held out {report.held_out_loss:.4f}, "
        f"untrained {report.untrained_loss:.4f}"
    )
    yield (
        f"gradient  norm {report.gradient_norm:.3g}, "
        f"largest {report.gradient_norm_max:.3g}, clipped to {options.clip_norm:g}"
    )
    if report.gradient_back:
        yield f"          by records back: {_gradient_back(report.gradient_back)}"
    yield f"held out  {share}; error = mean absolute error / last value's, the streams' median"
    for score in kept["held_out"]:
        yield f"          {_score(score)}"
    for warning in report.warnings:
        yield f"warning   {warning}"
    yield f"saved     {path}"


def _score(score: dict[str, Any]) -> str:
    if score["error_ratio"] is None:
        return f"{score['target']} +{score['steps']}: nothing to score"
    text = f"{score['target']} +{score['steps']}: error {score['error_ratio']:.3f}"
    text += f", better in {score['streams_better']} of {score['streams']} streams, {score['forecasts']:,} forecasts"
    if score["hit_rate"] is not None:
        text += f", direction {100 * score['hit_rate']:.1f} % of {score['directions_called']:,} called"
    return text


def _gradient_back(norms: Sequence[float]) -> str:
    """The norm 1, 2, 4, 8, ... records back and at the far end, in units of the first."""
    places = [place for place in (1 << power for power in range(16)) if place < len(norms)]
    return "  ".join(f"{place}: {norms[place - 1]:.2g}" for place in [*places, len(norms)])


def _refused(refused: Counter[Any]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in refused.most_common())
