"""`forecaster check`: one line for each thing that was looked at, and what is wrong with it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import orjson

from forecaster import log as logs
from forecaster.config import Config, InputConfig, KafkaConfig, load_config
from forecaster.errors import ForecasterError, InvalidConfig, ModelMismatch
from forecaster.networks import trained_model


class Finding(NamedTuple):
    """One line: all is well with it, or what is wrong."""

    ok: bool
    text: str


def run(arguments: argparse.Namespace) -> int:
    """0 all is well, 1 a finding, 2 the config itself cannot be used."""
    try:
        config = load_config(arguments.config, arguments.overrides)
        findings = [Finding(True, f"{arguments.config}: {_names(config)}"), *_local(config)]
    except InvalidConfig as error:
        if not arguments.json:
            raise
        _print_json([Finding(False, str(error))])
        return error.exit_code
    logs.configure(config.log.format, "error")
    if arguments.connect:
        findings += broker_findings(config)
    if arguments.json:
        _print_json(findings)
    else:
        sys.stdout.writelines(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.text}\n" for finding in findings)
    return 0 if all(finding.ok for finding in findings) else 1


def _print_json(findings: list[Finding]) -> None:
    document = {"ok": all(finding.ok for finding in findings), "findings": [each._asdict() for each in findings]}
    sys.stdout.write(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode() + "\n")


def _names(config: Config) -> str:
    count = len(config.inputs)
    return f"{count} input{'' if count == 1 else 's'}: {', '.join(each.name for each in config.inputs)}"


def _local(config: Config) -> Iterator[Finding]:
    """What this machine can say: models, secrets, certificates."""
    for each in config.inputs:
        yield _model(each)
    kafka = config.kafka
    if kafka.security_protocol.startswith("SASL"):
        given = bool(kafka.sasl_password)
        missing = "no password: set [kafka] sasl_password_file or FORECASTER__KAFKA__SASL_PASSWORD"
        yield Finding(given, f"password for {kafka.sasl_username}" if given else missing)
    for key in ("ssl_cafile", "ssl_certfile", "ssl_keyfile"):
        name = getattr(kafka, key)
        if name is not None:
            there = Path(name).is_file()
            yield Finding(there, f"[kafka] {key}: {name}" + ("" if there else " is no file"))


def _model(config: InputConfig) -> Finding:
    place = f"[[inputs]] {config.name} model"
    try:
        model = trained_model(config)
    except ModelMismatch as error:
        text = str(error)
        return Finding(False, text if text.startswith(place) else f"{place}: {text}")
    if model is None:
        return Finding(True, f"{place}: none, forecasts are the last value until `forecaster train`")
    return Finding(True, f"{place}: {config.model} version {model.version}")


def broker_findings(config: Config) -> list[Finding]:
    """What the broker says: it answers, the topics are there and agree, this user may use them."""
    from forecaster.kafka import check_topics, describe_topics  # noqa: PLC0415 - a config can be checked without

    kafka = config.kafka
    inputs = input_topics(config)
    wrong = check_topics(kafka, inputs)
    findings = [Finding(False, text) for text in wrong]
    states = [kafka.state_topic(name) for name in inputs]
    try:
        topics = describe_topics(kafka, [*inputs, kafka.forecast_topic, kafka.signal_topic, kafka.dead_letter_topic, *states])
    except ForecasterError as error:
        # Said already, or the broker went away in between.
        return findings or [Finding(False, str(error))]
    fine = [name for name in topics if not any(f"topic {name} " in f"{text} " for text in wrong)]
    return [
        Finding(True, f"broker {_where(kafka)} answers"),
        *(Finding(True, f"topic {name}: {_partitions(topics[name].partitions)}") for name in fine),
        *findings,
    ]


def input_topics(config: Config) -> list[str]:
    """The topics that the inputs name; those of a pattern are known to the broker alone."""
    return [topic for each in config.inputs for topic in each.topics]


def _where(kafka: KafkaConfig) -> str:
    return f"{kafka.bootstrap_servers} ({kafka.security_protocol})"


def _partitions(count: int) -> str:
    return f"{count} partition{'' if count == 1 else 's'}"
