"""`forecaster probe`: ask the daemon that runs with this config how it is; what a container's health check runs."""

from __future__ import annotations

import argparse
import http.client
import ssl
import sys
import urllib.error
import urllib.request
from typing import Any

import orjson

from forecaster.config import Config, load_config
from forecaster.errors import Fatal

TIMEOUT_S = 4.0
_UNSPECIFIED = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - where to ask what listens everywhere


def run(arguments: argparse.Namespace) -> int:
    """0 where it lives (livez) or is ready (readyz), else 1 with the reason in one line.

    Raises:
        Fatal: nobody answers.
    """
    config = load_config(arguments.config, arguments.overrides)
    status, answer = _ask(config, arguments.what)
    well = status == http.HTTPStatus.OK
    # A server that wants a login tells its status only.
    if arguments.what == "livez":
        told = answer.get("doing", "alive" if well else "not alive")
    else:
        failing = {name: why for name, why in answer.get("checks", {}).items() if why != "ok"}
        told = "; ".join(f"{name}: {why}" for name, why in failing.items()) or ("ready" if well else "not ready")
    sys.stdout.write(f"{told}\n")
    return 0 if well else 1


def _ask(config: Config, what: str) -> tuple[int, dict[str, Any]]:
    """The status and the document that /livez or /readyz answers."""
    host, _, port = config.http.listen.rpartition(":")
    scheme = "http" if config.http.ssl_certfile is None else "https"
    url = f"{scheme}://{_UNSPECIFIED.get(host, host)}:{port}/{what}"
    # Not through a proxy of the environment's: it is this machine.
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=_any_certificate())
    )
    try:
        with opener.open(url, timeout=TIMEOUT_S) as response:
            return response.status, orjson.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, orjson.loads(error.read())
    except (OSError, http.client.HTTPException, orjson.JSONDecodeError) as error:
        raise Fatal(f"no answer from {url}: {getattr(error, 'reason', error)}") from None


def _any_certificate() -> ssl.SSLContext:
    # The daemon's is made out to its name, not to this machine's loopback; and no secret is sent.
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
