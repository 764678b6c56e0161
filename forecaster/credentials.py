"""Secrets: where they may come from, and that nobody ever reads one out of a log.

In this order: the file that a `*_file` key names, the environment, systemd's
credentials. Never the config's own text, never a flag.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from forecaster.errors import InvalidConfig
from forecaster.log import redact

ENVIRONMENT_PREFIX = "FORECASTER__"


def read_secret(section: str, key: str, file: str | None) -> str | None:
    """The secret as it is now, None where there is none. From then on the log writes `***` for it.

    Args:
        section: `kafka`, `http`.
        key: what the secret is called there: `sasl_password`.
        file: what the `*_file` key names.

    Raises:
        InvalidConfig: its file is empty or cannot be read.
    """
    if file is None:
        secret = os.environ.get(variable(section, key)) or _from_systemd(section, key)
    else:
        secret = _text(Path(file), f"[{section}] {key}_file")
    if secret is not None:
        redact(secret)
    return secret


def variable(section: str, key: str) -> str:
    """The environment's variable: FORECASTER__KAFKA__SASL_PASSWORD."""
    return f"{ENVIRONMENT_PREFIX}{section}__{key}".upper()


def ways(section: str, key: str) -> str:
    """Where a secret that is missing should be put."""
    return f"set [{section}] {key}_file, {variable(section, key)} or the systemd credential {section}.{key}"


def _from_systemd(section: str, key: str) -> str | None:
    """`LoadCredential=kafka.sasl_password:...` puts it there."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        return None
    path = Path(directory, f"{section}.{key}")
    # One that is there and may not be read is a mistake, and not the same as none.
    with contextlib.suppress(PermissionError):
        if not path.exists():
            return None
    return _text(path, f"credential {section}.{key}")


def _text(path: Path, place: str) -> str:
    try:
        # An editor leaves a line's end.
        text = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise InvalidConfig(f"{place}: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidConfig(f"{place}: {path} is not text") from None
    if not text:
        raise InvalidConfig(f"{place}: {path} is empty")
    return text
