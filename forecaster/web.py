"""The daemon seen from outside: one HTTP server in one thread, for scrapes, probes and people.

It must not be able to harm the daemon. So everything a client can make it hold is
bounded: connections, the size of a request's head, the time to send it, the time to
take the answer, the requests of a second (guard.py). uvicorn limits only how many
requests run at once; a connection that never finishes its request would stay for ever,
and a few dozen of them would shut out Prometheus. Here such a connection has a
deadline, and when there are too many the one that has been dawdling longest makes room
for the newcomer.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import os
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Self, cast

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from forecaster.config import HttpConfig
from forecaster.errors import Fatal
from forecaster.guard import Address, Guard, Rate, invalid_listen, parse_listen
from forecaster.health import Health

# Prometheus, two probes and some people need fewer than ten.
CONNECTIONS_MAX = 64
# Not yet accepted. Beyond it the kernel drops the handshake, and an honest client tries again only a second later.
BACKLOG = 512
# A head has some 500 bytes; a browser's cookies from other services on localhost are the rest.
REQUEST_HEAD_BYTES_MAX = 16_384
# From connecting, or from the last answer, to the end of a request's head. On a local network: milliseconds.
REQUEST_TIMEOUT_S = 5
# To take an answer. Prometheus gives up after 10 s, too.
RESPONSE_TIMEOUT_S = 10
START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 3.0

# The text of all metrics and its content type, for an Accept header.
Exposition = Callable[[str], tuple[bytes, str]]

_PROBES = ("/livez", "/readyz")
_PATHS = {
    "/metrics": "every metric, for Prometheus",
    "/livez": "whether the process works: 200, or 503 when it should be restarted",
    "/readyz": "whether each check passes: 200, or 503 with what is missing",
}
# Answers are of this moment, and are what their type says.
_HEADERS = [
    ("cache-control", "no-store"),
    ("x-content-type-options", "nosniff"),
    ("content-security-policy", "default-src 'none'"),
]
# Beside those that talk: accepted, and not yet past TLS's handshake.
HANDSHAKES_MAX = 64


def create_app(health: Health, exposition: Exposition, guard: Guard) -> ASGIApp:
    """Make the ASGI application: `/`, `/metrics`, `/livez`, `/readyz`; the guard stands before it."""
    # async, so that they run in the server's one thread: a pool of forty would fight the worker for the interpreter.

    async def index(_: Request) -> Response:
        items = "".join(f'<li><a href="{path}">{path}</a> {html.escape(what)}</li>' for path, what in _PATHS.items())
        return HTMLResponse(f"<!doctype html><title>forecaster</title><h1>forecaster</h1><ul>{items}</ul>")

    async def metrics(request: Request) -> Response:
        content, content_type = exposition(request.headers.get("accept", ""))
        # In headers, because starlette would add a charset of its own to a media type.
        return Response(content, headers={"content-type": content_type})

    async def livez(request: Request) -> Response:
        stalled = health.stalled()
        told = {"doing": stalled or health.doing} if _may_know(request) else {}
        return JSONResponse({"alive": stalled is None} | told, 503 if stalled else 200)

    async def readyz(request: Request) -> Response:
        checks = health.checks()
        ready = not any(checks.values())
        told = {"checks": {name: why or "ok" for name, why in checks.items()}} if _may_know(request) else {}
        return JSONResponse({"ready": ready} | told, 200 if ready else 503)

    def _may_know(request: Request) -> bool:
        return guard.admits(request.headers.get("authorization", "").encode("latin-1"))

    routes = [Route("/", index), Route("/metrics", metrics), Route("/livez", livez), Route("/readyz", readyz)]
    app = Starlette(routes=routes)
    # Its redirect would go to whatever host the request's header names.
    app.router.redirect_slashes = False
    return _guarded(app, guard)


def _guarded(app: ASGIApp, guard: Guard) -> ASGIApp:
    """Only so many requests, and without a login only the probes: an orchestrator has none to give."""
    rate = Rate()

    async def admit(scope: Scope, receive: Receive, send: Send) -> None:
        probe = scope["path"] in _PROBES
        client = scope["client"]
        refusal = None
        # Probes are counted by themselves: who asks too much for /metrics must not have the daemon restarted.
        if not rate.admits((client[0] if client else None, probe)):
            refusal = Response(status_code=429, headers={"retry-after": "1", "connection": "close"})
        elif not probe and not guard.admits(dict(scope["headers"]).get(b"authorization", b"")):
            refusal = Response(status_code=401, headers={"www-authenticate": guard.challenge})
        await (refusal or app)(scope, receive, send)

    return admit


class WebServer:
    """The HTTP server, in a daemon thread between `start` and `stop`. Signal handlers stay as they are.

    Args:
        config: the [http] section; port 0 takes any free one, see `address`.
        health: what the probes read.
        exposition: what `/metrics` answers.

    Raises:
        InvalidConfig: `listen` is no address, or it would be open to other machines; a secret cannot be read.
    """

    def __init__(self, config: HttpConfig, health: Health, exposition: Exposition) -> None:
        # Where it is meant to listen, and from `start` on where it does.
        self.address = parse_listen(config.listen)
        self.guard = Guard(config, self.address.host)
        self._thread: threading.Thread | None = None
        self._waiting = _Waiting()
        tls = self.guard.tls
        self._server = uvicorn.Server(
            uvicorn.Config(
                create_app(health, exposition, self.guard),
                http=cast("type[H11Protocol]", partial(_BoundedProtocol, waiting=self._waiting)),
                ws="none",
                loop="asyncio",
                lifespan="off",
                interface="asgi3",
                # The log is configured by log.py, and a scrape is no event.
                log_config=None,
                access_log=False,
                server_header=False,
                headers=_HEADERS,
                backlog=BACKLOG,
                # One more than can be connected: it bounds the requests at work, not the connections.
                limit_concurrency=CONNECTIONS_MAX + 1,
                h11_max_incomplete_event_size=REQUEST_HEAD_BYTES_MAX,
                timeout_keep_alive=REQUEST_TIMEOUT_S,
                timeout_graceful_shutdown=1,
                ssl_context_factory=None if tls is None else lambda _config, _default: tls,
            )
        )

    @property
    def url(self) -> str:
        """The index page's address."""
        return f"http{'s' if self.guard.tls else ''}://{self.address}/"

    def start(self) -> None:
        """Bind and serve; returns when requests are answered.

        Raises:
            InvalidConfig: the address is in use, not this machine's, or not allowed.
            Fatal: the thread did not come up.
        """
        listener = self._bind()
        self.address = Address(*listener.getsockname()[:2])
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name="web", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._server.started:
            if time.monotonic() > deadline or not self._thread.is_alive():
                self.stop()
                message = f"the HTTP server on {self.address} did not start within {START_TIMEOUT_S:.0f} s"
                raise Fatal(message)
            time.sleep(0.005)

    def stop(self) -> None:
        """Finish the answers at hand and close, within `STOP_TIMEOUT_S`. Twice is fine."""
        if self._thread is None:
            return
        self._server.should_exit = True
        self._thread.join(STOP_TIMEOUT_S)
        self._thread = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _bind(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self.address.host else socket.AF_INET
        try:
            bound = socket.create_server(self.address, family=family, backlog=BACKLOG)
            return _Listener(bound, self._waiting)
        except socket.gaierror as error:
            raise invalid_listen(str(self.address), f"cannot find this host ({error.strerror})") from error
        except OSError as error:
            why = os.strerror(error.errno or 0).lower()
            raise invalid_listen(str(self.address), f"cannot listen here ({why})") from error


class _Waiting:
    """Connections that were accepted and do not talk yet: asyncio counts them nowhere while TLS shakes hands."""

    def __init__(self) -> None:
        self._sockets: dict[int, socket.socket] = {}

    def add(self, accepted: socket.socket) -> None:
        """One more; where there are too many the one that has been at it longest goes."""
        self._sockets = {number: each for number, each in self._sockets.items() if each.fileno() == number}
        self._sockets[accepted.fileno()] = accepted
        if len(self._sockets) > HANDSHAKES_MAX:
            with contextlib.suppress(OSError):
                self._sockets.pop(next(iter(self._sockets))).shutdown(socket.SHUT_RDWR)

    def remove(self, number: int) -> None:
        """It talks now, and has its deadline; `number` is its descriptor."""
        self._sockets.pop(number, None)


class _Listener(socket.socket):
    """The listening socket; the event loop takes what it accepts."""

    def __init__(self, bound: socket.socket, waiting: _Waiting) -> None:
        super().__init__(fileno=bound.detach())
        self._waiting = waiting

    def accept(self) -> tuple[socket.socket, object]:
        accepted, address = super().accept()
        self._waiting.add(accepted)
        return accepted, address


class _BoundedProtocol(H11Protocol):
    """One connection, which is either sending us a request or being answered, each within its time."""

    _deadline: asyncio.TimerHandle | None = None
    answering = False
    waiting_since_s = 0.0

    def __init__(self, *args: Any, waiting: _Waiting, **options: Any) -> None:
        super().__init__(*args, **options)
        self._waiting = waiting

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._waiting.remove(transport.get_extra_info("socket").fileno())
        super().connection_made(transport)
        self._await_request()
        if len(self.connections) > CONNECTIONS_MAX:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._note_request()

    def on_response_complete(self) -> None:
        self._await_request()
        super().on_response_complete()
        # The next request may have come together with the last.
        self._note_request()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def _await_request(self) -> None:
        self.answering = False
        self.waiting_since_s = self.loop.time()
        # uvicorn calls an answer complete when it is written, which is before the client has taken it.
        self._arm(RESPONSE_TIMEOUT_S if self.transport.get_write_buffer_size() else REQUEST_TIMEOUT_S)

    def _note_request(self) -> None:
        # Only the change starts another deadline: a byte now and then must not put it off.
        # There is no cycle before the first request.
        if not self.answering and not getattr(self.cycle, "response_complete", True):
            self.answering = True
            self._arm(RESPONSE_TIMEOUT_S)

    def _arm(self, timeout_s: float) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(timeout_s, self.drop)

    def _make_room(self) -> None:
        # Every connection is one of these: the server speaks nothing else.
        connections = cast("set[_BoundedProtocol]", self.connections)
        idle = [at for at in connections if not at.answering]
        min(idle, key=lambda at: at.waiting_since_s, default=self).drop()

    def drop(self) -> None:
        """Close without another word."""
        # At once, so that a burst of newcomers is counted right; connection_lost follows a turn of the loop later.
        self.connections.discard(self)
        self.transport.abort()
