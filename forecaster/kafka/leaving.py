"""Out of the group at once: no client lets a static member say goodbye."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kafka import errors
from kafka.admin import MemberToRemove

from forecaster.errors import ForecasterError
from forecaster.kafka import clients

if TYPE_CHECKING:
    from forecaster.config import KafkaConfig

log = logging.getLogger(__name__)


def leave_group(config: KafkaConfig, member: str) -> None:
    """Have the broker hand this member's partitions on now, and not when its session ends; where it answers."""
    try:
        admin = clients.admin(config)
    except ForecasterError:
        return  # away: the session's end does it
    try:
        # With the member id, so that a successor that already took the name over is not the one to go.
        gone = MemberToRemove(member_id=member, group_instance_id=config.instance, reason="closed")
        admin.remove_group_members(config.group_id, [gone])
    except errors.KafkaError as error:
        log.debug("leaving the group: %s", error)
    finally:
        admin.close()
