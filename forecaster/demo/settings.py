"""The demo's config: a file that a person can copy, and what is run is what is written there."""

from __future__ import annotations

import json
import socket
import tomllib
from pathlib import Path

from forecaster.config import Config, build_config

CONFIG_FILE = "config.toml"
MODELS = "models"
HTTP_PORT = 9108
# For people: what each input's streams are, and how far ahead its signal looks.
ABOUT = {"ticks": "daily closes", "sensors": "sea temperature every half hour", "agency": "US unemployment by month"}
AHEAD = {"ticks": "5 days", "sensors": "30 minutes", "agency": "3 months"}

CONFIG = """\
# What `forecaster demo` runs. Yours begins with a copy of it: another broker, your topics, your fields.

[kafka]
bootstrap_servers = {bootstrap}
group_id = "{prefix}forecaster-demo"
instance = "demo"
forecast_topic = "{prefix}forecasts"
signal_topic = "{prefix}signals"
dead_letter_topic = "{prefix}dead-letters"
# No more than [streams] capacity.
poll_records_max = 16

# Daily closes of five stocks: {{"symbol": "AAPL", "time": "2007-12-19T00:00:00Z", "close": 183.12, "volume": 29552800}}
[[inputs]]
name = "ticks"
topics = ["{prefix}ticks"]
stream = "symbol"
time = {{ field = "time", unit = "iso8601" }}
targets = ["close"]
features = ["volume"]
horizons = [1, 5, 20]
model = {ticks}
network = {{ cell = "lstm", units = 32 }}
signal = {{ horizon = 5, threshold = 0.52 }}

# Sea-surface temperature every half hour: {{"station": "sea-surface", "time": ..., "temperature": 4.316}}
[[inputs]]
name = "sensors"
topics = ["{prefix}sensors"]
stream = "station"
time = {{ field = "time", unit = "iso8601" }}
targets = ["temperature"]
horizons = [1, 6, 48]
seasons = [48]
model = {sensors}
network = {{ cell = "lstm", units = 32 }}
signal = {{ horizon = 1, threshold = 0.55 }}

# The unemployment rate of each month: {{"series": "unemployment", "time": ..., "rate": 4.5}}
[[inputs]]
name = "agency"
topics = ["{prefix}agency"]
stream = "series"
time = {{ field = "time", unit = "iso8601" }}
targets = ["rate"]
horizons = [1, 3, 12]
seasons = [12]
model = {agency}
network = {{ cell = "lstm", units = 32 }}
signal = {{ horizon = 3, threshold = 0.55 }}

[streams]
# Seven streams. For no more than 16 there is one shape to compile instead of four, so that the demo starts sooner.
capacity = 16

[http]
listen = "127.0.0.1:{port}"
"""


def write_config(directory: Path, bootstrap: str, prefix: str = "") -> Config:
    """Write config.toml into `directory`, and read it as anybody would.

    Args:
        directory: where it goes, and the models.
        bootstrap: the broker's address.
        prefix: of every topic and of the group.
    """
    models = {name: json.dumps(str(directory / MODELS / name)) for name in ABOUT}
    text = CONFIG.format(bootstrap=json.dumps(bootstrap), prefix=prefix, port=_http_port(), **models)
    path = directory / CONFIG_FILE
    path.write_text(text, encoding="utf-8")
    # Not load_config: a FORECASTER__ variable that is meant for a daemon of one's own is not meant for the demo.
    return build_config(tomllib.loads(text), str(path))


def _http_port() -> int:
    """The usual port where it is free, any free one else."""
    for port in (HTTP_PORT, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            free: int = probe.getsockname()[1]
            return free
    return HTTP_PORT
