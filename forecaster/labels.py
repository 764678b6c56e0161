"""The values that metric labels take: each is listed here or in the config, so that it is exported before it happens.

Why a record went to the dead letters is `errors.Reason`.
"""

from __future__ import annotations

from enum import StrEnum


class Stage(StrEnum):
    """Where the worker was when something failed or had to be tried again."""

    CONNECT = "connect"
    POLL = "poll"
    RESTORE = "restore"
    STEP = "step"
    PUBLISH = "publish"
    COMMIT = "commit"


class Rebalance(StrEnum):
    """What changed hands."""

    ASSIGNED = "assigned"
    REVOKED = "revoked"


class Eviction(StrEnum):
    """Why a stream lost its place in the state table, or its state."""

    CAPACITY = "capacity"  # to host memory: nothing is lost
    STREAMS_MAX = "streams_max"  # dropped, the longest idle one
    IDLE = "idle"  # dropped after idle_ttl_s
    MISMATCH = "mismatch"  # a stored state made for another network: begun anew
    OFFSETS_RESET = "offsets_reset"  # a stored state ahead of the group's offsets: begun anew


class Outcome(StrEnum):
    """How a transaction ended."""

    COMMITTED = "committed"
    ABORTED = "aborted"


class Swap(StrEnum):
    """What became of a version of an input's weights."""

    TAKEN_UP = "taken_up"  # every partition here is stepped with the new champion
    REFUSED = "refused"  # a new champion that cannot be used: damaged, or another network
    MISSING = "missing"  # a partition's last records were stepped with a version that is gone
    # By the learner:
    PROMOTED = "promoted"  # a challenger was better than the champion
    REJECTED = "rejected"  # one was not
    ROLLED_BACK = "rolled_back"  # a champion turned out worse than the one before it


class Direction(StrEnum):
    """What a signal says."""

    UP = "up"
    DOWN = "down"
    FLAT = "flat"


class Place(StrEnum):
    """Where an observation fell, seen from an interval."""

    BELOW = "below"
    INSIDE = "inside"
    ABOVE = "above"


class Call(StrEnum):
    """Whether a direction that was called came true."""

    HIT = "hit"
    MISS = "miss"
