"""Who may ask the HTTP server, and how often.

Beyond this machine it wants TLS and a login, unless the config says in so many words
that something else protects it. Everybody may ask as often as people and scrapes do.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import ssl
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, NamedTuple

from forecaster.credentials import ways
from forecaster.errors import InvalidConfig

if TYPE_CHECKING:
    from forecaster.config import HttpConfig

# A person who reloads and three scrapes in one second stay far below it.
RATE_PER_S = 20.0
BURST = 100.0
# Askers that are remembered; beyond it the one that has been silent longest is forgotten, with what it had used up.
ASKERS_MAX = 1_024
_PORT_MAX = 65_535


class Address(NamedTuple):
    """Where to listen, or where it listens."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_listen(listen: str) -> Address:
    """Read `host:port` or `[::1]:port`.

    Raises:
        InvalidConfig: it is neither.
    """
    host, colon, port = listen.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    plain = host[1:-1] if bracketed else host
    # isdecimal alone would take Arabic digits, and int() takes "1_0" and " 1".
    if not (colon and plain and port.isascii() and port.isdecimal() and int(port) <= _PORT_MAX):
        raise invalid_listen(listen, "expected host:port, 0 for any free port")
    if bracketed != (":" in plain):
        raise invalid_listen(listen, "expected an IPv6 address in brackets")
    return Address(plain, int(port))


def invalid_listen(listen: str, detail: str) -> InvalidConfig:
    """The complaint about `listen`."""
    return InvalidConfig(f"[http] listen: {detail}, got {listen!r}")


class Guard:
    """The server's certificate and the logins that it takes.

    Args:
        config: the [http] section.
        host: where it listens.

    Raises:
        InvalidConfig: a secret or certificate cannot be used, or it would be open to other machines.
    """

    def __init__(self, config: HttpConfig, host: str) -> None:
        self._config = config
        self.tls = None if config.ssl_certfile is None else _context()
        self._logins: tuple[bytes, ...] = ()
        self.load()
        if not (is_loopback(host) or config.unprotected or (self.tls is not None and self._logins)):
            raise InvalidConfig(
                f"[http] listen: {config.listen} is open to other machines: it needs ssl_certfile and ssl_keyfile, and"
                " a bearer_token or a username with its password; or unprotected = true"
            )

    def load(self) -> None:
        """Read certificate and secrets, again if need be: whatever is renewed holds from the next connection on."""
        config = self._config
        logins = []
        password, token = config.password, config.bearer_token
        if config.username is not None:
            if password is None:
                raise InvalidConfig(f"[http] username: has no password: {ways('http', 'password')}")
            logins.append(b"Basic " + base64.b64encode(f"{config.username}:{password}".encode()))
        elif password is not None:
            raise InvalidConfig("[http] username: a password needs one")
        if token is not None:
            logins.append(b"Bearer " + token.encode())
        if self.tls is not None:
            _load_certificate(self.tls, config)
        self._logins = tuple(logins)

    @property
    def asks(self) -> bool:
        """Is a login needed?"""
        return bool(self._logins)

    @property
    def challenge(self) -> str:
        """What a 401 asks for."""
        return 'Basic realm="forecaster"' if self._config.username is not None else "Bearer"

    def admits(self, authorization: bytes) -> bool:
        """Is this header one of the logins, or is none needed? In a time that says nothing of how near it came."""
        scheme, _, word = authorization.partition(b" ")
        given = _canonical(scheme.lower(), word.strip())
        # Each is compared, whether one before it fits or not.
        return not self._logins or sum(hmac.compare_digest(given, login) for login in self._logins) > 0


def _canonical(scheme: bytes, word: bytes) -> bytes:
    """As the logins are kept: base64 may be written in more than one way."""
    if scheme == b"bearer":
        return b"Bearer " + word
    if scheme != b"basic":
        return b""
    try:
        return b"Basic " + base64.b64encode(base64.b64decode(word))
    except binascii.Error:
        return b""


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _load_certificate(context: ssl.SSLContext, config: HttpConfig) -> None:
    assert config.ssl_certfile is not None
    try:
        # Without a password OpenSSL would ask the terminal for a locked key's.
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, "")
    except ssl.SSLError as error:
        raise InvalidConfig(
            f"[http] ssl_certfile: {config.ssl_certfile} and its key do not fit: {error.reason}"
        ) from None
    except OSError as error:
        files = f"{config.ssl_certfile} or {config.ssl_keyfile}"
        raise InvalidConfig(f"[http] ssl_certfile: cannot read {files}: {error.strerror}") from None


def is_loopback(host: str) -> bool:
    """Can only this machine come to that address? A name that may be anybody's counts as no."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Rate:
    """So many requests a second for each asker, and some at once: what is beyond is refused."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()  # asker: (requests left, as of)

    def admits(self, asker: Hashable) -> bool:
        """Count one request; False where it is one too many."""
        now_s = self._clock()
        left, since_s = self._left.pop(asker, (BURST, now_s))
        left = min(BURST, left + (now_s - since_s) * RATE_PER_S)
        admitted = left >= 1.0
        self._left[asker] = (left - admitted, now_s)
        if len(self._left) > ASKERS_MAX:
            self._left.popitem(last=False)
        return admitted
