"""Topics made, described and read; keys to partitions, against two other authors."""

from __future__ import annotations

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, ConfigResource, ResourceType
from conftest import Broker, NewTopics, create_topic
from kafka_witness import produce, read_committed, settings

from forecaster.config import KafkaConfig
from forecaster.errors import BrokerRefused
from forecaster.kafka import (
    Time,
    check_topics,
    create_topics,
    describe_topics,
    partition_for_key,
    read_range,
)


@pytest.fixture
def config(kafka: Broker, group: str) -> KafkaConfig:
    """A config whose output topics nobody has made yet."""
    return settings(kafka.bootstrap_servers, group, signal_topic=f"{group}-signals", dead_letter_topic=f"{group}-dead")


def test_create_makes_outputs_as_wide_as_the_input(config: KafkaConfig, new_topic: NewTopics) -> None:
    """Outputs and state have the input's partition count; only the state is compacted; a second time makes nothing."""
    topic = new_topic("in", partitions=3)
    outputs = [config.forecast_topic, config.signal_topic, config.dead_letter_topic]
    state = config.state_topic(topic)
    assert create_topics(config, [topic]) == [*outputs, state]
    assert create_topics(config, [topic]) == []
    admin = AdminClient({"bootstrap.servers": config.bootstrap_servers})
    listed = admin.list_topics(timeout=30).topics
    assert [len(listed[name].partitions) for name in [*outputs, state]] == [3, 3, 3, 3]
    policies = {}
    for name in (config.forecast_topic, state):
        resource = ConfigResource(ResourceType.TOPIC, name)
        policies[name] = admin.describe_configs([resource])[resource].result(30)["cleanup.policy"].value
    assert policies == {config.forecast_topic: "delete", state: "compact"}


def test_create_makes_a_missing_input(config: KafkaConfig, group: str) -> None:
    """An input that does not exist is made with the partitions that are asked for."""
    assert f"{group}-in" in create_topics(config, [f"{group}-in"], partitions=5)
    assert describe_topics(config, [f"{group}-in"])[f"{group}-in"].partitions == 5


def test_check_has_nothing_to_say_of_what_create_made(config: KafkaConfig, new_topic: NewTopics) -> None:
    """After create_topics, check_topics finds nothing."""
    topic = new_topic("in", partitions=2)
    create_topics(config, [topic])
    assert check_topics(config, [topic]) == []


def test_check_names_what_is_wrong(config: KafkaConfig, new_topic: NewTopics, kafka: Broker) -> None:
    """A missing topic, a state topic of another width and one that is not compacted: one line each, with the mend."""
    topic = new_topic("in", partitions=2)
    create_topic(kafka.bootstrap_servers, config.state_topic(topic), partitions=3)
    create_topic(kafka.bootstrap_servers, config.forecast_topic)
    findings = check_topics(config, [topic])
    assert all("\n" not in finding for finding in findings)
    assert [finding for finding in findings if "does not exist: forecaster topics create" in finding] == [
        f"topic {config.signal_topic} does not exist: forecaster topics create",
        f"topic {config.dead_letter_topic} does not exist: forecaster topics create",
    ]
    assert f"topic {config.state_topic(topic)} has 3 partitions and {topic} has 2: they must be equal" in findings
    assert any("is not compacted" in finding for finding in findings)
    assert len(findings) == 4


def test_check_names_a_broker_that_is_away() -> None:
    """No broker is one finding, not one for each topic."""
    findings = check_topics(settings("127.0.0.1:1", "g"), ["in"])
    assert findings == ["no broker answers at 127.0.0.1:1: Connection refused"]


def test_partitions_as_librdkafka_chooses_them(kafka: Broker, new_topic: NewTopics) -> None:
    """partition_for_key is what another client's murmur2 partitioner does with the same keys."""
    topic = new_topic(partitions=7)
    keys = ["", "AAPL", "boiler-7/temperature", "é", "ключ", *(f"stream-{number}" for number in range(200))]
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "partitioner": "murmur2_random"})
    for key in keys[1:]:
        producer.produce(topic, key=key, value=key)
    assert producer.flush(30) == 0
    seen = {message.key().decode(): message.partition() for message in read_committed(kafka.bootstrap_servers, topic)}
    assert seen == {key: partition_for_key(key.encode(), 7) for key in keys[1:]}


def test_partitions_as_java_chooses_them() -> None:
    """The hashes that Kafka's own UtilsTest.testMurmur2 lists."""
    hashes = {
        b"21": -973932308,
        b"foobar": -790332482,
        b"a-little-bit-long-string": -985981536,
        b"a-little-bit-longer-string": -1486304829,
        b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
        b"abc": 479470107,
    }
    for key, signed in hashes.items():
        assert partition_for_key(key, 1_000_003) == (signed & 0x7FFFFFFF) % 1_000_003


def test_read_range_between_offsets(kafka: Broker, config: KafkaConfig, new_topic: NewTopics) -> None:
    """From the first offset up to but not including the last, in the partitions that are named."""
    topic = new_topic(partitions=2)
    for number in range(2):
        produce(kafka.bootstrap_servers, topic, [f"{number}{letter}" for letter in "abcdef"], partition=number)
    batches = read_range(config, topic, start={0: 1, 1: 0}, end={0: 4, 1: 2})
    assert sorted(r.value.decode() for batch in batches for r in batch if r.value) == ["0b", "0c", "0d", "1a", "1b"]
    only = read_range(config, topic, start={1: 5})
    assert [r.value for batch in only for r in batch] == [b"1f"]


def test_read_range_between_times(kafka: Broker, config: KafkaConfig, new_topic: NewTopics) -> None:
    """From the first record that is not before the start up to the first that is not before the end."""
    topic = new_topic()
    for hour in range(5):
        produce(kafka.bootstrap_servers, topic, [str(hour)], timestamp=1_700_000_000_000 + hour * 3_600_000)
    start, end = Time(1_700_000_000_000 + 3_600_000), Time(1_700_000_000_000 + 3 * 3_600_000)
    assert [r.value for batch in read_range(config, topic, start=start, end=end) for r in batch] == [b"1", b"2"]
    late = Time(1_800_000_000_000)
    assert list(read_range(config, topic, start=late)) == []
    assert len([r for batch in read_range(config, topic, end=late) for r in batch]) == 5


def test_read_range_leaves_aborted_records_out(
    kafka: Broker, config: KafkaConfig, new_topic: NewTopics, group: str
) -> None:
    """A transaction that was aborted is not read, and one that ends the topic does not keep the reader waiting."""
    topic = new_topic()
    produce(kafka.bootstrap_servers, topic, ["a"])
    writer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "transactional.id": group})
    writer.init_transactions(30)
    writer.begin_transaction()
    writer.produce(topic, value="aborted")
    writer.flush(30)
    writer.abort_transaction(30)
    assert [r.value for batch in read_range(config, topic) for r in batch] == [b"a"]


def test_read_range_of_nothing(config: KafkaConfig, new_topic: NewTopics) -> None:
    """An empty topic is no records, and a missing one is a line."""
    assert list(read_range(config, new_topic())) == []
    with pytest.raises(BrokerRefused, match="does not exist"):
        list(read_range(config, "no-such-topic"))
