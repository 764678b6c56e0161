"""librdkafka's errors, turned into what the daemon does about them.

The broker's own error codes are the same for every client: they go the way that
kafka-python's go. The client's local ones (below zero) are put beside theirs here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from confluent_kafka import KafkaError, KafkaException, Message
from kafka import errors

from forecaster.errors import ForecasterError
from forecaster.kafka import failures
from forecaster.records import TopicPartition

if TYPE_CHECKING:
    from forecaster.config import KafkaConfig

AWAY = frozenset({KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._DESTROY_BROKER})  # noqa: SLF001 - the library's names
# None of these is the loop's to mend: the client goes on by itself.
PASSING = frozenset(
    {
        KafkaError._MAX_POLL_EXCEEDED,  # noqa: SLF001 - the library's constants are named so
        KafkaError._AUTO_OFFSET_RESET,  # noqa: SLF001
        *AWAY,
        KafkaError.UNKNOWN_TOPIC_OR_PART,  # deleted, or a broker that has just started
    }
)
PARTITION_EOF: int = KafkaError._PARTITION_EOF  # noqa: SLF001
WRONG_STATE: int = KafkaError._STATE  # noqa: SLF001

_LOCAL: dict[int, type[errors.KafkaError]] = {
    KafkaError._AUTHENTICATION: errors.SaslAuthenticationFailedError,  # noqa: SLF001
    KafkaError._FENCED: errors.ProducerFencedError,  # noqa: SLF001
    KafkaError._TIMED_OUT: errors.KafkaTimeoutError,  # noqa: SLF001
    KafkaError._TIMED_OUT_QUEUE: errors.KafkaTimeoutError,  # noqa: SLF001
    KafkaError._MSG_TIMED_OUT: errors.KafkaTimeoutError,  # noqa: SLF001
    KafkaError._TRANSPORT: errors.KafkaConnectionError,  # noqa: SLF001
    KafkaError._ALL_BROKERS_DOWN: errors.KafkaConnectionError,  # noqa: SLF001
    KafkaError._DESTROY_BROKER: errors.KafkaConnectionError,  # noqa: SLF001 - it made room for the same broker, anew
    KafkaError._RESOLVE: errors.KafkaConnectionError,  # noqa: SLF001
    KafkaError._WAIT_COORD: errors.CoordinatorNotAvailableError,  # noqa: SLF001
    KafkaError._ASSIGNMENT_LOST: errors.CommitFailedError,  # noqa: SLF001
    KafkaError._UNKNOWN_TOPIC: errors.UnknownTopicOrPartitionError,  # noqa: SLF001
    # Also what it says of any partition while no broker is there.
    KafkaError._UNKNOWN_PARTITION: errors.LeaderNotAvailableError,  # noqa: SLF001
}

_OF_A_TOPIC = (errors.UnknownTopicOrPartitionError, errors.TopicAuthorizationFailedError, errors.InvalidTopicError)


def translate(error: KafkaError, config: KafkaConfig, *, in_transaction: bool = False) -> ForecasterError:
    """Our error for one of the client's; see kafka/failures.py."""
    return failures.translate(as_kafka_python(error), config, in_transaction=in_transaction)


def as_kafka_python(error: KafkaError, topic: str | None = None) -> errors.KafkaError:
    """The same error as the other client has it; one that is about a topic names it."""
    code = error.code()
    if code == KafkaError._FATAL and "group.instance.id" in error.str():  # noqa: SLF001
        return errors.FencedInstanceIdError()  # the code does not say why
    kind = _LOCAL.get(code, errors.KafkaError) if code < 0 else errors.for_code(code)
    return kind(topic if topic is not None and issubclass(kind, _OF_A_TOPIC) else error.str())


def end_of_partition(message: Message) -> tuple[TopicPartition, int] | None:
    """Where a partition has been read to, if that is what this event says; past a transaction's marker, too."""
    error, topic, number, offset = message.error(), message.topic(), message.partition(), message.offset()
    if error is None or error.code() != PARTITION_EOF or topic is None or number is None or offset is None:
        return None
    return TopicPartition(topic, number), offset


def of(exception: KafkaException) -> KafkaError:
    """The error inside."""
    error: KafkaError = exception.args[0]
    return error


@contextlib.contextmanager
def translated(config: KafkaConfig, *, in_transaction: bool = False) -> Iterator[None]:
    """Run a block of client calls; only our errors come out."""
    try:
        yield
    except KafkaException as error:
        raise translate(of(error), config, in_transaction=in_transaction) from error
