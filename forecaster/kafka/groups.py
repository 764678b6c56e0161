"""A consumer group seen from outside: who is in it, how far it has committed; and its offsets set while it is empty."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kafka import errors

from forecaster.errors import Fatal
from forecaster.kafka import clients
from forecaster.kafka.failures import translate, translated
from forecaster.kafka.offsets import decode_commit
from forecaster.kafka.sink import client_offsets
from forecaster.records import Commit, TopicPartition

if TYPE_CHECKING:
    from forecaster.config import KafkaConfig


def committed_offsets(config: KafkaConfig) -> dict[TopicPartition, Commit]:
    """How far the group has answered each partition that it has ever committed; none if there is no such group."""
    admin = clients.admin(config)
    try:
        with translated(config):
            found = admin.list_group_offsets({config.group_id: None}).get(config.group_id, {})
    finally:
        admin.close()
    return {
        TopicPartition(*partition): decode_commit(told.offset, told.metadata)
        for partition, told in found.items()
        if told.offset >= 0
    }


def group_members(config: KafkaConfig) -> list[str]:
    """The instances that the broker takes for alive."""
    admin = clients.admin(config)
    try:
        group = admin.describe_groups([config.group_id])[config.group_id]
    except errors.GroupIdNotFoundError:
        return []
    except errors.KafkaError as error:
        raise translate(error, config) from error
    finally:
        admin.close()
    members: list[dict[str, Any]] = group.get("members", [])
    return sorted(member.get("group_instance_id") or member["member_id"] for member in members)


def commit_offsets(config: KafkaConfig, offsets: Mapping[TopicPartition, Commit]) -> None:
    """Set the group's offsets. The broker refuses where it has members.

    Raises:
        Fatal: refused, nothing is set.
    """
    if not offsets:
        return
    admin = clients.admin(config)
    try:
        with translated(config):
            told = admin.alter_group_offsets(config.group_id, client_offsets(offsets))
    finally:
        admin.close()
    for partition, answer in told.items():
        if answer is not errors.NoError and not isinstance(answer, errors.NoError):
            name = answer.__name__ if isinstance(answer, type) else type(answer).__name__
            raise Fatal(f"group {config.group_id}: the offset of {partition.topic}/{partition.partition}: {name}")
