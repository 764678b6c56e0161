"""`forecaster check`: one line for each thing that was looked at, and what is wrong with it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import orjson

from forecaster import log as logs
from forecaster.config import Config, HttpConfig, InputConfig, KafkaConfig, load_config
from forecaster.credentials import ways
from forecaster.effective import as_toml
from forecaster.errors import ForecasterError, InvalidConfig, ModelMismatch
from forecaster.guard import Guard, parse_listen
from forecaster.model import registry
from forecaster.model.spec import NetworkSpec
from forecaster.networks import network_spec, nothing_learned, trained_model
from forecaster.routing import Routes


class Finding(NamedTuple):
    """One line: all is well with it, or what is wrong."""

    ok: bool
    text: str

    @classmethod
    def fine(cls, text: str) -> Finding:
        """It is as it should be."""
        return cls(ok=True, text=text)

    @classmethod
    def wrong(cls, text: str) -> Finding:
        """It is not, and the text says what to mend."""
        return cls(ok=False, text=text)


def run(arguments: argparse.Namespace) -> int:
    """0 all is well, 1 a finding, 2 the config itself cannot be used."""
    try:
        config = load_config(arguments.config, arguments.overrides)
        findings = [Finding.fine(f"{arguments.config}: {_names(config)}"), *_local(config)]
    except InvalidConfig as error:
        if not arguments.json:
            raise
        _print_json([Finding.wrong(str(error))])
        return error.exit_code
    logs.configure(config.log.format, "error")
    if arguments.show:
        sys.stdout.write(as_toml(config))
        return 0
    if arguments.connect:
        findings += broker_findings(config)
    if arguments.json:
        _print_json(findings)
    else:
        sys.stdout.writelines(_line(finding) for finding in findings)
    return 0 if all(finding.ok for finding in findings) else 1


def _line(finding: Finding) -> str:
    return f"{'ok  ' if finding.ok else 'FAIL'}  {logs.clean(finding.text)}\n"


def _print_json(findings: list[Finding]) -> None:
    document = {"ok": all(finding.ok for finding in findings), "findings": [each._asdict() for each in findings]}
    sys.stdout.write(logs.clean(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode()) + "\n")


def _names(config: Config) -> str:
    count = len(config.inputs)
    return f"{count} input{'' if count == 1 else 's'}: {', '.join(each.name for each in config.inputs)}"


def _local(config: Config) -> Iterator[Finding]:
    """What this machine can say: models, secrets, certificates."""
    yield _http(config.http)
    for each in config.inputs:
        yield _model(each, learns=config.learning.enabled)
    kafka = config.kafka
    if kafka.client == "librdkafka":
        yield _client(kafka)
    yield from _secrets(config)
    for key in ("ssl_cafile", "ssl_certfile", "ssl_keyfile"):
        name = getattr(kafka, key)
        if name is not None:
            text = f"[kafka] {key}: {name}"
            yield Finding.fine(text) if Path(name).is_file() else Finding.wrong(f"{text} is no file")


def _http(config: HttpConfig) -> Finding:
    try:
        guard = Guard(config, parse_listen(config.listen).host)
    except InvalidConfig as error:
        return Finding.wrong(str(error))
    login = "a login" if guard.asks else "no login"
    return Finding.fine(f"[http] listen: {config.listen}, {'TLS' if guard.tls else 'no TLS'}, {login}")


def _secrets(config: Config) -> Iterator[Finding]:
    """The secrets that the config needs: each is there, and nothing more is said of it."""
    kafka = config.kafka
    needed = []
    if kafka.security_protocol.startswith("SASL"):
        oauth = "oauth_token" if kafka.oauth_token_url is None else "oauth_client_secret"
        needed.append(("kafka", oauth if kafka.sasl_mechanism == "OAUTHBEARER" else "sasl_password"))
    for section, key in needed:
        try:
            given = getattr(getattr(config, section), key) is not None
        except InvalidConfig as error:
            yield Finding.wrong(str(error))
            continue
        text = f"[{section}] {key}"
        yield Finding.fine(f"{text}: ***") if given else Finding.wrong(f"{text} is missing: {ways(section, key)}")


def _client(kafka: KafkaConfig) -> Finding:
    from forecaster.kafka import require_client  # noqa: PLC0415 - a config can be checked without

    try:
        require_client(kafka)
    except InvalidConfig as error:
        return Finding.wrong(str(error))
    return Finding.fine(f"[kafka] client: {kafka.client} is installed")


def _model(config: InputConfig, *, learns: bool) -> Finding:
    place = f"[[inputs]] {config.name} model"
    if learns and config.model is not None and nothing_learned(config):
        return Finding.fine(f"{place}: {config.model} is empty, the learner begins there")
    try:
        model = trained_model(config)
    except ModelMismatch as error:
        text = str(error)
        return Finding.wrong(text if text.startswith(place) else f"{place}: {text}")
    if model is None:
        return Finding.fine(f"{place}: none, forecasts are the last value until `forecaster train`")
    sizes = set(NetworkSpec.__struct_fields__) - {*registry.QUESTION, "seasons"}
    other = "; it ".join(registry.differences(model.spec, network_spec(config, ()), sorted(sizes)))
    return Finding.fine(f"{place}: {config.model} version {model.version}{other and f', which {other}'}")


def broker_findings(config: Config) -> list[Finding]:
    """What the broker says: it answers, the topics are there and agree, this user may use them."""
    from forecaster.kafka import check_topics, describe_topics  # noqa: PLC0415 - a config can be checked without

    kafka = config.kafka
    try:
        inputs, rekeyed = input_topics(config), rekeyed_topics(config)
        topics = describe_topics(kafka, _all_topics(kafka, inputs, rekeyed))
        wrong = check_topics(kafka, inputs, rekeyed)
    except ForecasterError as error:
        return [Finding.wrong(str(error))]
    fine = [name for name in topics if not any(f"topic {name} " in f"{text} " for text in wrong)]
    return [
        Finding.fine(f"broker {_where(kafka)} answers"),
        *(Finding.fine(f"topic {name}: {_partitions(topics[name].partitions)}") for name in fine),
        *map(Finding.wrong, wrong),
        *_patterns(config, inputs),
    ]


def input_topics(config: Config) -> list[str]:
    """The topics of the inputs: those named, and those that the broker has for a pattern. Raises as the broker does."""
    from forecaster.kafka import matching_topics, subscription_pattern  # noqa: PLC0415

    topics = [topic for each in config.inputs for topic in each.topics]
    patterns = [each.pattern for each in config.inputs if each.pattern is not None]
    if patterns:
        topics += matching_topics(config.kafka, subscription_pattern(config.kafka, topics, patterns))
    return list(dict.fromkeys(topics))


def rekeyed_topics(config: Config) -> list[str]:
    """Those of them that have an internal topic beside them."""
    return [topic for each in config.inputs if each.repartition for topic in each.topics]


def _all_topics(kafka: KafkaConfig, inputs: list[str], rekeyed: list[str]) -> list[str]:
    """In the order in which a record meets them."""
    internal = {topic: kafka.internal_topic(topic) for topic in rekeyed}
    states = [kafka.state_topic(internal.get(topic, topic)) for topic in inputs]
    outputs = (kafka.forecast_topic, kafka.signal_topic, kafka.dead_letter_topic)
    return [*inputs, *internal.values(), *outputs, *states]


def _patterns(config: Config, topics: list[str]) -> Iterator[Finding]:
    """A pattern that matches nothing yet is no mistake; a topic that two match is."""
    routes = Routes(config.inputs, config.kafka)
    for topic in topics:
        try:
            routes.input_of(topic)
        except InvalidConfig as error:
            yield Finding.wrong(str(error))


def _where(kafka: KafkaConfig) -> str:
    return f"{kafka.bootstrap_servers} ({kafka.security_protocol})"


def _partitions(count: int) -> str:
    return f"{count} partition{'' if count == 1 else 's'}"
