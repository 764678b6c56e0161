"""kafka-python's errors, turned into what the daemon does about them.

The client retries most trouble by itself and says why only in its own log: a wrong
password, a bad certificate and a broker that is away all end as "unable to
bootstrap". So while a client is being built, its log is listened to for the reason.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kafka import errors

from forecaster.errors import (
    BrokerRefused,
    BrokerUnavailable,
    Fatal,
    Fenced,
    ForecasterError,
    TransactionAborted,
)

if TYPE_CHECKING:
    from forecaster.config import KafkaConfig

# Where the client says why a connection failed.
_CONNECTION_LOG = logging.getLogger("kafka.net")
# Where it says what the broker has against a token; it goes up to the other.
_OAUTH_LOG = logging.getLogger("kafka.net.sasl.oauth")

_FENCED = (errors.ProducerFencedError, errors.InvalidProducerEpochError, errors.FencedInstanceIdError)

# Somebody else has the partition now, or the group is changing hands: the batch is not ours to commit.
_NOT_OURS = (
    errors.CommitFailedError,
    errors.RebalanceInProgressError,
    errors.IllegalGenerationError,
    errors.UnknownMemberIdError,
)

_AWAY = (errors.RetriableError, errors.BrokerNotAvailableError, errors.UnknownBrokerIdError)


def translate(error: Exception, config: KafkaConfig, *, in_transaction: bool = False) -> ForecasterError:
    """Our error for one of the client's.

    Args:
        error: what the client raised, or what one of its futures holds.
        config: names the settings that the message tells to mend.
        in_transaction: the trouble is one batch's, and giving that batch up mends it.
    """
    error = cause(error)
    refusal = _refusal(error, config)
    if refusal:
        return BrokerRefused(refusal)
    if isinstance(error, _FENCED):
        return Fenced(
            f"fenced: another daemon of group {config.group_id} runs as instance {config.instance}, or this one"
            f" slept past transaction_timeout_s; give each its own [kafka] instance"
        )
    if in_transaction or isinstance(error, _NOT_OURS):
        return TransactionAborted(f"transaction given up: {_one_line(error)}")
    if isinstance(error, _AWAY):
        return BrokerUnavailable(f"no answer from {config.bootstrap_servers}: {_one_line(error)}")
    return Fatal(f"Kafka client: {_one_line(error)}")


@contextlib.contextmanager
def translated(config: KafkaConfig, *, in_transaction: bool = False) -> Iterator[None]:
    """Run a block of client calls; only our errors come out."""
    try:
        yield
    except errors.KafkaError as error:
        raise translate(error, config, in_transaction=in_transaction) from error


@contextlib.contextmanager
def connecting(config: KafkaConfig) -> Iterator[None]:
    """Build a client inside: when it cannot connect, the reason is what its log said last.

    Raises:
        BrokerRefused: wrong password, wrong certificate, wrong protocol.
        BrokerUnavailable: nobody there, or no answer in time.
    """
    listener = _Listener()
    level, oauth_level, propagate = _CONNECTION_LOG.level, _OAUTH_LOG.level, _CONNECTION_LOG.propagate
    # Its own handlers are left out meanwhile: the one line that we raise says it all.
    _CONNECTION_LOG.setLevel(logging.DEBUG)
    _OAUTH_LOG.setLevel(logging.DEBUG)
    _CONNECTION_LOG.propagate = False
    _CONNECTION_LOG.addHandler(listener)
    try:
        yield
    except (errors.KafkaError, OSError) as error:
        # OSError: a certificate file that cannot be read.
        raise _cannot_connect(error, listener, config) from error
    finally:
        _CONNECTION_LOG.removeHandler(listener)
        _CONNECTION_LOG.setLevel(level)
        _OAUTH_LOG.setLevel(oauth_level)
        _CONNECTION_LOG.propagate = propagate


class _Listener(logging.Handler):
    """Keeps why a connection failed; of two reasons the one that names a cause wins.

    A broker answers a wrong password and hangs up, and the client drops an answer
    that it reads together with the end of the connection. So what it sent is looked at
    too, which it logs for debugging: to be hung up on after the login, again and
    again, is that answer. Nothing of these records is kept: the login is in them.
    """

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.reason = ""
        self.refusal = ""
        self._login_sent = False
        self._hung_up = 0

    def emit(self, record: logging.LogRecord) -> None:
        for argument in record.args if isinstance(record.args, tuple) else ():
            if record.name == _OAUTH_LOG.name and isinstance(argument, str):
                self.refusal = " ".join(argument.split())
            kind = type(argument).__name__
            if kind in ("SaslHandshakeRequest", "SaslAuthenticateRequest"):
                self._login_sent = True
            elif kind in ("SaslHandshakeResponse", "SaslAuthenticateResponse"):
                self._login_sent = False
            elif isinstance(argument, errors.SaslAuthenticationFailedError | errors.UnsupportedSaslMechanismError):
                self.refusal = _one_line(argument)
            elif isinstance(argument, Exception) and not isinstance(argument, errors.KafkaTimeoutError):
                # The timeout is what giving up is called; it is no reason.
                self._failed(_one_line(argument))

    def _failed(self, told: str) -> None:
        self._hung_up += self._login_sent
        self._login_sent = False
        if self._hung_up > 1 and not self.refusal:
            self.refusal = "it hangs up on the login"
        if _of_tls(told) or not _of_tls(self.reason):
            self.reason = told


def _of_tls(reason: str) -> bool:
    return any(word in reason.lower() for word in ("certificate", "ssl", "tls"))


def _cannot_connect(error: Exception, told: _Listener, config: KafkaConfig) -> ForecasterError:
    where = f"{config.bootstrap_servers} ({config.security_protocol})"
    refusal = _refused_login(told, where, config) or _refusal(cause(error), config)
    if not refusal and isinstance(error, OSError):
        refusal = f"cannot read the TLS files for {where}: {_one_line(error)}; check [kafka] ssl_cafile"
    if not refusal and "ALERT" in told.reason:
        # It is the broker that says no to our certificate, or to having none.
        refusal = f"{where} refused the daemon's certificate: {told.reason}; check [kafka] ssl_certfile"
    if not refusal and _of_tls(told.reason):
        refusal = f"no TLS with {where}: {told.reason}; check [kafka] security_protocol and ssl_cafile"
    if refusal:
        return BrokerRefused(refusal)
    return BrokerUnavailable(f"no answer from {where}" + (f": {told.reason}" if told.reason else ""))


def _refused_login(told: _Listener, where: str, config: KafkaConfig) -> str | None:
    if not told.refusal:
        return None
    if config.sasl_mechanism == "OAUTHBEARER":
        return f"{where} refused the token: {told.refusal}; check where it is from, and for whom"
    what = "check [kafka] sasl_username, its password and sasl_mechanism"
    return f"{where} refused user {config.sasl_username}: {told.refusal}; {what}"


def _refusal(error: Exception, config: KafkaConfig) -> str | None:
    """One line for what only a person can mend, None for everything else."""
    group, topics = config.group_id, _topics(error)
    lines: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
        (
            errors.SaslAuthenticationFailedError,
            (
                f"{config.bootstrap_servers} refused user {config.sasl_username}: check [kafka] sasl_username and its"
                " password"
            ),
        ),
        (
            (errors.UnsupportedSaslMechanismError, errors.IllegalSaslStateError),
            f"the broker does not take {config.sasl_mechanism}: check [kafka] sasl_mechanism",
        ),
        (errors.TopicAuthorizationFailedError, f"not authorised to use topic {topics}: its ACLs must allow this user"),
        (errors.GroupAuthorizationFailedError, f"not authorised to join group {group}: its ACLs must allow READ"),
        (
            errors.TransactionalIdAuthorizationFailedError,
            f"not authorised to use transactional id {config.client_id}: its ACLs must allow WRITE",
        ),
        (errors.ClusterAuthorizationFailedError, "not authorised by the cluster: its ACLs must allow this user"),
        (
            errors.UnknownTopicOrPartitionError,
            f"topic {topics} or a partition of it does not exist: forecaster topics create",
        ),
        (errors.InvalidTopicError, f"topic {topics} has a name that Kafka does not take"),
        (
            (errors.MessageSizeTooLargeError, errors.RecordListTooLargeError),
            "an output is larger than its topic takes: raise the topic's max.message.bytes",
        ),
        (
            errors.InvalidTransactionTimeoutError,
            "[kafka] transaction_timeout_s is above the broker's transaction.max.timeout.ms",
        ),
        (
            errors.InvalidSessionTimeoutError,
            "[kafka] session_timeout_s is outside of the broker's group.min/max.session.timeout.ms",
        ),
        (
            errors.InconsistentGroupProtocolError,
            f"group {group} has members that are no forecasters: choose another [kafka] group_id",
        ),
        (errors.GroupMaxSizeReachedError, f"group {group} is full: raise the broker's group.max.size"),
        (errors.UnsupportedVersionError, "the broker is too old: exactly-once needs Kafka 2.5 or newer"),
    )
    for kinds, line in lines:
        if isinstance(error, kinds):
            return line
    return None


def _topics(error: Exception) -> str:
    named = error.args[0] if error.args else ""
    if isinstance(named, set | frozenset | list | tuple):
        return ", ".join(sorted(map(str, named)))
    return str(named)


def cause(error: Exception) -> Exception:
    """The client wraps a first error in a bare KafkaError: what stands inside says more."""
    while type(error) is errors.KafkaError:
        inner = [argument for argument in error.args if isinstance(argument, Exception)]
        if not inner:
            return error
        error = inner[0]
    return error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
