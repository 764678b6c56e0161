"""Tokens for OAUTHBEARER: out of a file that somebody keeps fresh, or from an identity provider.

The client asks for one at every login. A provider's token is kept until it is about to
expire; a file is read each time. The first one is fetched before a client is built, so
that what is wrong with it is told as what it is, and not as a broker that is away.
"""

from __future__ import annotations

import base64
import functools
import http.client
import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import TYPE_CHECKING, Any

from kafka.net.sasl.oauth import AbstractTokenProvider

from forecaster.credentials import ways
from forecaster.errors import BrokerRefused, BrokerUnavailable, InvalidConfig
from forecaster.log import redact

if TYPE_CHECKING:
    from forecaster.config import KafkaConfig

# It is asked for by the client's own thread, which serves every connection.
REQUEST_TIMEOUT_S = 5.0
ANSWER_BYTES_MAX = 100_000
# A provider that does not say how long a token holds: ask again soon.
LIFETIME_S = 60.0
# A fresh one is asked for when so much of the old one's time is over.
RENEW_AFTER = 0.8


class FileToken(AbstractTokenProvider):  # type: ignore[misc]
    """The token as its file, the environment or the credential has it now."""

    def __init__(self, config: KafkaConfig) -> None:
        self._config = config

    def token(self) -> str:
        """Raises InvalidConfig where there is none."""
        token = self._config.oauth_token
        if token is None:
            raise InvalidConfig(f"OAUTHBEARER has no token: {ways('kafka', 'oauth_token')}, or [kafka] oauth_token_url")
        return token

    def left_s(self) -> float:
        """When it should be asked for again: nobody knows what the file's token says."""
        return LIFETIME_S


class ClientCredentials(AbstractTokenProvider):  # type: ignore[misc]
    """The token that a provider gives for the client's id and secret (RFC 6749, section 4.4)."""

    def __init__(self, config: KafkaConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._token = ""
        self._renew_s = self._ends_s = 0.0

    def token(self) -> str:
        """Raises BrokerRefused or BrokerUnavailable, one line, where there is none to be had."""
        with self._lock:
            if time.monotonic() >= self._renew_s:
                self._token, lifetime_s = self._fetch()
                now_s = time.monotonic()
                self._renew_s, self._ends_s = now_s + RENEW_AFTER * lifetime_s, now_s + lifetime_s
            return self._token

    def left_s(self) -> float:
        """How long the token that was given last still holds."""
        return max(1.0, self._ends_s - time.monotonic())

    def _fetch(self) -> tuple[str, float]:
        answer = self._ask()
        try:
            document: dict[str, Any] = json.loads(answer)
            token, lifetime_s = str(document["access_token"]), float(document.get("expires_in", LIFETIME_S))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BrokerRefused(
                f"{self._where}: its answer has no access_token; check [kafka] oauth_token_url"
            ) from None
        redact(token, "kafka.oauth_access_token")
        return token, lifetime_s

    def _ask(self) -> bytes:
        try:
            with urllib.request.urlopen(self._request(), timeout=REQUEST_TIMEOUT_S) as answer:  # noqa: S310 - config.py
                content: bytes = answer.read(ANSWER_BYTES_MAX)
                return content
        except urllib.error.HTTPError as error:
            error.close()
            client = f"{self._where} refused client {self._config.oauth_client_id}: {error.code} {error.reason}"
            if error.code >= http.client.INTERNAL_SERVER_ERROR:
                raise BrokerUnavailable(client) from None
            raise BrokerRefused(f"{client}; check [kafka] oauth_client_id, its secret and oauth_scope") from None
        except (OSError, http.client.HTTPException) as error:
            raise BrokerUnavailable(f"{self._where} gives no token: {getattr(error, 'reason', error)}") from None

    def _request(self) -> urllib.request.Request:
        config = self._config
        secret = config.oauth_client_secret
        if secret is None:
            raise InvalidConfig(f"OAUTHBEARER has no client secret: {ways('kafka', 'oauth_client_secret')}")
        form = {"grant_type": "client_credentials"} | ({"scope": config.oauth_scope} if config.oauth_scope else {})
        login = ":".join(urllib.parse.quote_plus(part) for part in (config.oauth_client_id or "", secret))
        return urllib.request.Request(  # noqa: S310 - https, or this machine: config.py sees to it
            config.oauth_token_url or "",
            urllib.parse.urlencode(form).encode(),
            {"Authorization": "Basic " + base64.b64encode(login.encode()).decode(), "Accept": "application/json"},
        )

    @property
    def _where(self) -> str:
        return f"token endpoint {self._config.oauth_token_url}"


@functools.lru_cache(maxsize=4)
def token_provider(config: KafkaConfig) -> FileToken | ClientCredentials:
    """One for all clients of a config, so that they share its token."""
    return FileToken(config) if config.oauth_token_url is None else ClientCredentials(config)
