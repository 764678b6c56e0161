"""The image and the compose file, by the judgement of their own tools."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"


def compose() -> dict[str, Any]:
    """The compose file as it is written, with its anchors followed."""
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return loaded


def test_hadolint_finds_nothing_wrong_with_the_dockerfile() -> None:
    """Not a word from it, and not a rule switched off."""
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
    assert "hadolint ignore" not in (DEPLOY / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def docker_compose() -> str:
    """Docker's own program. Needs no engine."""
    docker = shutil.which("docker")
    found = docker and subprocess.run([docker, "compose", "version"], capture_output=True, timeout=60, check=False)
    if not found or found.returncode:
        pytest.skip("no docker compose here")
    assert docker is not None
    return docker


def test_compose_understands_its_file(docker_compose: str) -> None:
    """Every key is one that it knows, and every variable has a default."""
    done = subprocess.run(
        [docker_compose, "compose", "-f", DEPLOY / "compose.yaml", "config", "--quiet"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_compose_mounts_what_is_there() -> None:
    """A file that has moved would be made anew by Docker, as an empty directory."""
    for name, service in compose()["services"].items():
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), f"{name} mounts {source}"


def test_compose_is_for_this_machine_only() -> None:
    """Every published port is on loopback, and no container can gain a privilege."""
    for name, service in compose()["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
