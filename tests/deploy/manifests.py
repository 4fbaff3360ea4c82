"""The Kubernetes objects of deploy/kubernetes, as `kubectl kustomize` renders them."""

import re
import shutil
import subprocess
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

# Between the end of the drain and the end of the process: connections to the broker are closed (2 s), those to the
# database (GATEWAY_DATABASE_TIMEOUT_S, 2 s), the last spans (3 s) and the last log lines (2 s) are written.
EXIT_MARGIN_S = 10
KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"
# kustomize appends a hash to the name of a generated ConfigMap, and to every reference to it.
_HASH = re.compile(r"(name: sms-gateway(?:-sidecar)?)-[0-9a-z]{10}$", flags=re.MULTILINE)

URLS = {"GATEWAY_DATABASE_URL": "postgres://user@database/gateway", "GATEWAY_AMQP_URL": "amqps://user@broker/"}

Object = dict[str, Any]


def render(folder: str | Path) -> list[Object]:
    """Return all objects of a folder below deploy/kubernetes, or of any folder given as an absolute path.

    Without kubectl, the test or the module that asks is skipped.
    """
    return deepcopy(_rendered(KUBERNETES / folder))


@cache
def _rendered(folder: Path) -> list[Object]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which renders the manifests, is not installed", allow_module_level=True)
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60, check=False)  # noqa: S603, S607
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(_HASH.sub(r"\1", done.stdout)))


def containers(workload: Object) -> list[Object]:
    """Return all containers of a Deployment or a Job, sidecars included."""
    pod = workload["spec"]["template"]["spec"]
    return [*pod.get("initContainers", []), *pod["containers"]]


def only(objects: list[Object], kind: str) -> Object:
    """Return the one object of a kind."""
    (found,) = [one for one in objects if one["kind"] == kind]
    return found


def gateway_of(workload: Object) -> Object:
    """Return the gateway's container of a Deployment or a Job."""
    (found,) = [one for one in containers(workload) if "sms-gateway" in one["image"]]
    return found


def probes_of(container: Object) -> dict[str, Object]:
    """Return the probes of a container by name."""
    return {name: value for name, value in container.items() if name.endswith("Probe")}


def environment_of(folder: str | Path) -> dict[str, str]:
    """Return the gateway's environment, with example URLs in place of the Secrets' values."""
    objects = render(folder)
    container = gateway_of(only(objects, "Deployment"))
    wanted = {source["configMapRef"]["name"] for source in container["envFrom"] if "configMapRef" in source}
    maps = {one["metadata"]["name"]: one["data"] for one in objects if one["kind"] == "ConfigMap"}
    environment: dict[str, str] = {**URLS}
    for name in wanted:
        environment |= maps[name]
    return environment | _variables_of(container, only(objects, "Deployment")["metadata"])


def _variables_of(container: Object, metadata: Object) -> dict[str, str]:
    """Return what `env` sets, expanded in order as Kubernetes does it; the value of a Secret's key is its name."""
    values: dict[str, str] = {}
    for variable in container.get("env", []):
        match variable:
            case {"value": raw}:
                value = re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], raw)
            case {"valueFrom": {"secretKeyRef": {"key": value}}}:
                pass
            case {"valueFrom": {"fieldRef": {"fieldPath": path}}}:
                value = metadata[path.removeprefix("metadata.")]
        values[variable["name"]] = value
    return values
