"""Topics: make them, describe them, and say in one line each what is wrong with them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from kafka import errors
from kafka.admin import ConfigResource, ConfigResourceType

from forecaster.errors import BrokerRefused, ForecasterError
from forecaster.kafka import clients
from forecaster.kafka.failures import translated

if TYPE_CHECKING:
    from forecaster.config import KafkaConfig


class TopicDescription(NamedTuple):
    """What the broker says of one topic."""

    partitions: int  # 0: it does not exist
    compacted: bool | None  # None: not asked, or not allowed to ask
    operations: frozenset[str]  # what this user may do: READ, WRITE, DESCRIBE, ...
    authorised: bool = True  # False: we may not even ask

    @property
    def exists(self) -> bool:
        """It is there, and we may see it."""
        return self.partitions > 0


def describe_topics(config: KafkaConfig, names: Sequence[str], *, configs: bool = False) -> dict[str, TopicDescription]:
    """Every one of `names`; one that does not exist has no partitions.

    Args:
        config: the [kafka] section.
        names: topics.
        configs: ask for the cleanup policy too (needs DESCRIBE_CONFIGS).
    """
    with _admin(config) as admin:
        return _describe(admin, names, configs=configs)


def require_topics(config: KafkaConfig, names: Sequence[str]) -> dict[str, TopicDescription]:
    """The topics. Raises BrokerRefused, one line, where one of them does not exist or may not be seen."""
    found = describe_topics(config, names) if names else {}
    for name, topic in found.items():
        for finding in _findings(name, topic, ()):
            raise BrokerRefused(finding)
    return found


def require_access(config: KafkaConfig, inputs: Sequence[str], rekeyed: Collection[str] = ()) -> None:
    """Raises BrokerRefused, one line, where one of the daemon's topics is missing or may not be used as it does."""
    uses = _uses(config, inputs, rekeyed)
    topics = describe_topics(config, list(uses))
    findings = [finding for name, needs in uses.items() for finding in _findings(name, topics[name], needs)]
    if findings:
        raise BrokerRefused("; ".join(findings))


def create_topics(
    config: KafkaConfig,
    inputs: Sequence[str],
    partitions: int | None = None,
    replication: int | None = None,
    rekeyed: Collection[str] = (),
) -> list[str]:
    """Make what is missing: the inputs, the outputs, a compacted state topic for each input.

    A state topic gets as many partitions as its input. Inputs and outputs get `partitions`; by default
    inputs what the broker gives, and outputs as many as the input with the most. `replication` is of all of
    them, by default the broker's. An input that is `rekeyed` gets an internal topic beside it, which has the state.

    Returns:
        The names of those that were made.
    """
    with _admin(config) as admin:
        made = _create(admin, {name: _new(partitions, replication) for name in inputs}, inputs)
        found = _describe(admin, inputs, configs=False)
        counts = {name: found[name].partitions for name in inputs}
        outputs = (config.forecast_topic, config.signal_topic, config.dead_letter_topic)
        wanted = {name: _new(partitions or max(counts.values(), default=1), replication) for name in outputs}
        wanted |= {config.internal_topic(name): _new(counts[name], replication) for name in rekeyed}
        for state, name in _states(config, inputs, rekeyed).items():
            wanted[state] = _new(counts[name], replication, compacted=True)
        return made + _create(admin, wanted, list(wanted))


def matching_topics(config: KafkaConfig, pattern: str) -> list[str]:
    """The topics that exist now and whose whole name this regular expression matches, by name."""
    with _admin(config) as admin:
        return sorted(name for name in admin.list_topics() if re.fullmatch(pattern, name))


def check_topics(config: KafkaConfig, inputs: Sequence[str], rekeyed: Collection[str] = ()) -> list[str]:
    """What would keep the daemon from running against this broker: one line for each finding, none if all is well."""
    states = _states(config, inputs, rekeyed)
    internal = {config.internal_topic(name): name for name in rekeyed}
    uses = _uses(config, inputs, rekeyed)
    try:
        topics = describe_topics(config, list(uses), configs=True)
    except ForecasterError as error:
        return [str(error)]
    findings = [finding for name, needs in uses.items() for finding in _findings(name, topics[name], needs)]
    for mine, name in (states | internal).items():
        have, want = topics[mine], topics[name]
        if have.exists and want.exists and have.partitions != want.partitions:
            findings.append(
                f"topic {mine} has {have.partitions} partitions and {name} has {want.partitions}: they must be equal"
            )
    findings += [
        f"topic {state} is not compacted: set its cleanup.policy to compact"
        for state in states
        if topics[state].compacted is False
    ]
    return findings


def _states(config: KafkaConfig, inputs: Sequence[str], rekeyed: Collection[str]) -> dict[str, str]:
    """Each state topic, and the input that it has its number of partitions from."""
    read = {name: config.internal_topic(name) if name in rekeyed else name for name in inputs}
    return {config.state_topic(topic): name for name, topic in read.items()}


def _uses(config: KafkaConfig, inputs: Sequence[str], rekeyed: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Every topic of the daemon's, and what it does with it."""
    ours = [*(config.internal_topic(name) for name in rekeyed), *_states(config, inputs, rekeyed)]
    outputs = (config.forecast_topic, config.signal_topic, config.dead_letter_topic)
    return (
        dict.fromkeys(inputs, ("READ",)) | dict.fromkeys(outputs, ("WRITE",)) | dict.fromkeys(ours, ("READ", "WRITE"))
    )


def _findings(name: str, topic: TopicDescription, needs: Sequence[str]) -> list[str]:
    if not topic.authorised:
        return [f"not authorised to use topic {name}: its ACLs must allow this user"]
    if not topic.exists:
        return [f"topic {name} does not exist: forecaster topics create"]
    missing = [need for need in needs if topic.operations and need not in topic.operations]
    return [f"not authorised to {need} topic {name}: its ACLs must allow it" for need in missing]


@contextlib.contextmanager
def _admin(config: KafkaConfig) -> Iterator[Any]:
    admin = clients.admin(config)
    try:
        with translated(config):
            yield admin
    finally:
        admin.close()


def _describe(admin: Any, names: Sequence[str], *, configs: bool) -> dict[str, TopicDescription]:
    described = {topic["name"]: topic for topic in admin.describe_topics(list(dict.fromkeys(names)))}
    found = {name: _description(described[name]) for name in names}
    if configs:
        existing = [name for name, topic in found.items() if topic.exists]
        for name, settings in _configs(admin, existing).items():
            # No answer where this user may not ask: then nothing is said about it.
            policy = settings.get("cleanup.policy", {}).get("value")
            found[name] = found[name]._replace(compacted=None if policy is None else "compact" in policy)
    return found


def _description(topic: dict[str, Any]) -> TopicDescription:
    error = errors.for_code(topic["error_code"])
    operations = topic.get("topic_authorized_operations", topic.get("authorized_operations"))
    allowed = frozenset(operations) if isinstance(operations, list) else frozenset()
    if error is errors.NoError:
        return TopicDescription(len(topic["partitions"]), compacted=None, operations=allowed)
    missing = error in (errors.UnknownTopicOrPartitionError, errors.LeaderNotAvailableError)
    return TopicDescription(0, compacted=None, operations=allowed, authorised=missing)


def _configs(admin: Any, names: Sequence[str]) -> dict[str, Any]:
    resources = [ConfigResource(ConfigResourceType.TOPIC, name, ["cleanup.policy"]) for name in names]
    return admin.describe_configs(resources, config_filter="all").get("topic", {}) if names else {}


def _new(partitions: int | None, replication: int | None = None, *, compacted: bool = False) -> dict[str, Any]:
    # -1: the broker's own default.
    topic: dict[str, Any] = {"num_partitions": partitions or -1, "replication_factor": replication or -1}
    if compacted:
        # Rows are rewritten every flush_interval_s: compact soon, or a restore reads them all again.
        topic["configs"] = {"cleanup.policy": "compact", "min.cleanable.dirty.ratio": "0.2", "segment.ms": "600000"}
    return topic


def _create(admin: Any, wanted: dict[str, dict[str, Any]], names: Sequence[str]) -> list[str]:
    found = _describe(admin, names, configs=False)
    missing = {name: wanted[name] for name in names if not found[name].exists}
    if not missing:
        return []
    # All are asked for even if one is refused; one that another instance made meanwhile is as good.
    told = admin.create_topics(missing, raise_errors=False)
    for topic in told["topics"]:
        error = errors.for_code(topic["error_code"])
        if error not in (errors.NoError, errors.TopicAlreadyExistsError):
            raise BrokerRefused(f"cannot create topic {topic['name']}: {topic.get('error_message') or error.__name__}")
    admin.wait_for_topics(list(missing))
    return list(missing)
