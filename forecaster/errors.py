"""What can go wrong, sorted by what the daemon does about it.

ForecasterError
├── InvalidRecord        to the dead letters with its reason, go on
├── BrokerUnavailable    back off, try again
├── TransactionAborted   undo, seek back, new producer
│   └── TransactionOutlasted  and fewer records in the next
└── Fatal                say it in one line, exit non-zero
    ├── InvalidConfig    the file, the environment or a flag (exit 2)
    ├── InvalidHistory   a file of history that cannot be read
    ├── ModelMismatch    weights or state that do not fit the config
    ├── BrokerRefused    wrong password, wrong certificate, no permission, no such topic
    └── Fenced           another instance took this one's identity
"""

from __future__ import annotations

from enum import StrEnum


class ForecasterError(Exception):
    """Everything that forecaster raises on purpose."""


class Reason(StrEnum):
    """Why a record went to the dead letters: the `reason` header and the metric's label."""

    NOT_JSON = "not_json"
    NOT_UTF8 = "not_utf8"
    WRONG_SHAPE = "wrong_shape"
    MISSING_FIELD = "missing_field"
    WRONG_TYPE = "wrong_type"
    NOT_FINITE = "not_finite"
    BAD_TIME = "bad_time"
    TIME_OUT_OF_RANGE = "time_out_of_range"
    TOO_LARGE = "too_large"
    TOMBSTONE = "tombstone"
    UNKNOWN_STREAM_KEY = "unknown_stream_key"
    LATE = "late"
    DUPLICATE = "duplicate"


class InvalidRecord(ForecasterError):
    """This record cannot be stepped; every other one can.

    Attributes:
        reason: one of Reason, exported as a label.
        detail: one line for the person who reads the dead letter.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class BrokerUnavailable(ForecasterError):
    """The broker does not answer just now. Nothing is lost by waiting."""


class TransactionAborted(ForecasterError):
    """This poll's outputs will never be seen. Undo its steps and read its records again."""


class TransactionOutlasted(TransactionAborted):
    """The broker ended it because it was open for too long."""


class Fatal(ForecasterError):
    """Going on would break a promise, or cannot work. The message is the one line a person reads."""

    exit_code = 1


class InvalidConfig(Fatal):
    """`file: [section] key: expected this, got that`."""

    exit_code = 2


class InvalidHistory(Fatal):
    """A file given to train, replay or backtest that cannot be read as the input's records."""


class ModelMismatch(Fatal):
    """Weights or a state row made for another network than the config's."""


class BrokerRefused(Fatal):
    """The broker answered, and the answer is no: credentials, certificate, permission, topic."""


class Fenced(Fatal):
    """Another instance with the same transactional id or group instance id is alive."""
