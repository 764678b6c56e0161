"""The source when a question to the broker fails at the wrong moment."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conftest import Broker, NewTopics
from kafka_witness import poll_records, poll_until, produce, settings

from forecaster.errors import BrokerUnavailable, Fenced
from forecaster.kafka import GroupSource, open_source
from forecaster.records import TopicPartition


@pytest.fixture
def source(kafka: Broker, group: str, new_topic: NewTopics, client: str) -> Iterator[GroupSource]:
    """A source of one live partition that has been read to its end."""
    topic = new_topic()
    opened = open_source(settings(kafka.bootstrap_servers, group, client=client), [topic])
    produce(kafka.bootstrap_servers, topic, "ab")
    poll_records(opened, 2)
    yield opened
    opened.close()


def test_records_outlive_a_question_that_fails(
    kafka: Broker, source: GroupSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records that came with a new partition, whose offset the broker does not tell just now, are not lost."""
    (topic,) = source._topics

    def away(_: float) -> None:
        raise BrokerUnavailable

    produce(kafka.bootstrap_servers, topic, "cd")
    monkeypatch.setattr(source, "_resolve_pending", away)
    source._held.pending[TopicPartition(topic, 7)] = None
    polls = []
    while sum(len(poll.records) for poll in polls) < 2:
        try:
            polls.append(source.poll(0.2))
        except BrokerUnavailable:
            continue
    assert [record.value for poll in polls for record in poll.records] == [b"c", b"d"]
    with pytest.raises(BrokerUnavailable):
        source.poll(0.2)
    monkeypatch.undo()
    del source._held.pending[TopicPartition(topic, 7)]
    produce(kafka.bootstrap_servers, topic, "e")
    assert poll_until(source, lambda polls: any(poll.records for poll in polls))


def test_an_idle_member_whose_name_is_taken_is_told(source: GroupSource) -> None:
    """Trap: the client only logs that it was fenced, stops its heartbeats and spins; we end the daemon."""
    newer = open_source(source._config, source._topics)
    try:
        poll_until(newer, lambda polls: any(poll.assigned for poll in polls))
        with pytest.raises(Fenced, match="instance one"):
            poll_until(source, lambda _: False, timeout_s=30.0)
    finally:
        newer.close()
