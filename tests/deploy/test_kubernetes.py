"""The manifests, as kubectl builds them and by Kubernetes' own schemas."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from forecaster.config import build_config
from forecaster.sections import KafkaConfig

KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"
COMPONENTS = sorted(path.name for path in (KUBERNETES / "components").iterdir())
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
# Their schemas are those of Prometheus Operator and KEDA, which Kubernetes does not have.
CUSTOM = {"ServiceMonitor", "PrometheusRule", "ScaledObject"}

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here")

Manifest = dict[str, Any]


def build(directory: Path) -> list[Manifest]:
    """What `kubectl apply -k` would send."""
    done = subprocess.run(["kubectl", "kustomize", directory], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stderr, done.returncode) == ("", 0)
    return list(yaml.safe_load_all(done.stdout))


def build_with(components: list[str], directory: Path) -> list[Manifest]:
    """The base with these components, as an overlay of somebody's own."""
    places = {
        "resources": [os.path.relpath(KUBERNETES / "base", directory)],
        "components": [os.path.relpath(KUBERNETES / "components" / name, directory) for name in components],
    }
    (directory / "kustomization.yaml").write_text(yaml.safe_dump({"namespace": "mine", **places}))
    return build(directory)


def of_kind(manifests: list[Manifest], kind: str) -> Manifest:
    """The only one of its kind."""
    (found,) = [each for each in manifests if each["kind"] == kind]
    return found


def validate(manifests: list[Manifest], directory: Path) -> None:
    """Every key is one that Kubernetes knows; other people's kinds aside."""
    path = directory / "manifests.yaml"
    path.write_text(yaml.safe_dump_all(each for each in manifests if each["kind"] not in CUSTOM))
    command = [Path(sys.executable).with_name("kubernetes-validate"), "--strict", "--quiet", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_valid(overlay: str, tmp_path: Path) -> None:
    """It builds without a warning, strictly by the schemas."""
    validate(build(KUBERNETES / "overlays" / overlay), tmp_path)


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_component_is_valid(component: str, tmp_path: Path) -> None:
    """Each of them alone, on the base."""
    validate(build_with([component], tmp_path), tmp_path)


def test_all_components_go_together(tmp_path: Path) -> None:
    """None undoes another; the Job gets the config by the name that the pods have it by."""
    manifests = build_with(COMPONENTS, tmp_path)
    validate(manifests, tmp_path)
    config = of_kind(manifests, "ConfigMap")["metadata"]["name"]
    for kind in ("StatefulSet", "Job"):
        volumes = of_kind(manifests, kind)["spec"]["template"]["spec"]["volumes"]
        assert {"name": "config", "configMap": {"name": config}} in volumes


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_overlay_scales_by_itself(overlay: str) -> None:
    """KEDA is an example, for who asks for it."""
    assert "ScaledObject" not in {each["kind"] for each in build(KUBERNETES / "overlays" / overlay)}


def test_the_config_is_one_that_the_daemon_takes() -> None:
    """What lies in the ConfigMap is valid, and every pod is an instance of its own."""
    files = of_kind(build(KUBERNETES / "base"), "ConfigMap")["data"]
    config = build_config(tomllib.loads(files["config.toml"]), "config.toml")
    assert "instance" not in tomllib.loads(files["config.toml"])["kafka"]
    assert config.http.listen.endswith(f":{port(of_kind(build(KUBERNETES / 'base'), 'StatefulSet'))}")


def test_killing_waits_for_the_daemon() -> None:
    """Who drains is not killed, and who waits for its broker's answer is not taken for dead."""
    pod = of_kind(build(KUBERNETES / "base"), "StatefulSet")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["terminationGracePeriodSeconds"] > 10
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"] >= 60


def test_scaling_goes_by_the_daemon_s_group(tmp_path: Path) -> None:
    """The group and the topic whose lag KEDA looks at are those of the config."""
    manifests = build_with(["keda"], tmp_path)
    config = build_config(tomllib.loads(of_kind(manifests, "ConfigMap")["data"]["config.toml"]), "config.toml")
    (trigger,) = of_kind(manifests, "ScaledObject")["spec"]["triggers"]
    kafka: KafkaConfig = config.kafka
    told = {"consumerGroup": kafka.group_id, "bootstrapServers": kafka.bootstrap_servers}
    assert trigger["metadata"] | told == trigger["metadata"]
    assert trigger["metadata"]["topic"] in config.inputs[0].topics
    assert "replicas" not in of_kind(manifests, "StatefulSet")["spec"]


def test_images_are_of_this_version(tmp_path: Path) -> None:
    """The tags follow pyproject.toml's version."""
    manifests = build_with(COMPONENTS, tmp_path)
    images = {
        container["image"]
        for kind in ("StatefulSet", "Job")
        for container in of_kind(manifests, kind)["spec"]["template"]["spec"]["containers"]
    }
    tag = f"registry.example/forecaster:{version('forecaster')}"
    assert images == {f"{tag}-gpu", tag}


def port(stateful_set: Manifest) -> int:
    """The container's."""
    (container,) = stateful_set["spec"]["template"]["spec"]["containers"]
    (declared,) = container["ports"]
    number: int = declared["containerPort"]
    return number
