"""What `kubectl kustomize` makes of the folders below deploy/kubernetes, as far as they use it.

Small enough to need no program that may be missing; where kubectl is installed, test_manifests.py compares the two. A
feature that is not known here is refused, not passed over.
"""

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"
KNOWN = {
    *["apiVersion", "kind", "namespace", "resources", "components", "configMapGenerator", "images", "patches"],
}
MERGED_BY = {  # the lists that a strategic merge merges item by item, and by which field; all others it replaces
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "volumeMounts": "mountPath",
}

URLS = {"GATEWAY_DATABASE_URL": "postgres://user@database/gateway", "GATEWAY_AMQP_URL": "amqps://user@broker/"}

Object = dict[str, Any]


def render(folder: str | Path, into: list[Object] | None = None) -> list[Object]:
    """All objects of a folder; of a component, what becomes of `into`."""
    directory = (KUBERNETES / folder).resolve()
    kustomization = _documents(directory / "kustomization.yaml")[0]
    assert set(kustomization) <= KNOWN, f"{directory.name}: not known here: {set(kustomization) - KNOWN}"
    objects = into or []
    for name in kustomization.get("resources", []):
        path = directory / name
        objects += render(path) if path.is_dir() else _documents(path)
    objects += [_config_map(directory, generator) for generator in kustomization.get("configMapGenerator", [])]
    for name in kustomization.get("components", []):
        objects = render(directory / name, objects)
    for patch in kustomization.get("patches", []):
        (change,) = _documents(directory / patch["path"])
        targets = [one for one in objects if _is_target(one, change, patch.get("target"))]
        assert targets, f"{directory.name}: {patch['path']} patches nothing"
        for one in targets:
            name = one["metadata"]["name"]
            _merge(one, change)
            one["metadata"]["name"] = name
    for one in objects:
        if "namespace" in kustomization and one["kind"] != "Namespace":
            one["metadata"]["namespace"] = kustomization["namespace"]
        for image in kustomization.get("images", []):
            _set_image(one, image)
    return objects


def containers(workload: Object) -> list[Object]:
    """All containers of a Deployment or a Job, sidecars included."""
    pod = workload["spec"]["template"]["spec"]
    return [*pod.get("initContainers", []), *pod["containers"]]


def only(objects: list[Object], kind: str) -> Object:
    (found,) = [one for one in objects if one["kind"] == kind]
    return found


def gateway_of(deployment: Object) -> Object:
    (found,) = [one for one in containers(deployment) if "sms-gateway" in one["image"]]
    return found


def environment_of(folder: str) -> dict[str, str]:
    """The gateway's environment, with what the Secrets would bring."""
    objects = render(folder)
    container = gateway_of(only(objects, "Deployment"))
    wanted = {source["configMapRef"]["name"] for source in container["envFrom"] if "configMapRef" in source}
    maps = {one["metadata"]["name"]: one["data"] for one in objects if one["kind"] == "ConfigMap"}
    environment: dict[str, str] = {**URLS}
    for name in wanted:
        environment |= maps[name]
    return environment | _variables_of(container)


def _variables_of(container: Object) -> dict[str, str]:
    """What `env` sets, expanded in its order as Kubernetes does it; a Secret's value is its key."""
    values: dict[str, str] = {}
    for variable in container.get("env", []):
        raw = variable.get("value") or variable["valueFrom"]["secretKeyRef"]["key"]
        values[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], raw)
    return values


def _documents(path: Path) -> list[Object]:
    return list(yaml.safe_load_all(path.read_text()))


def _config_map(directory: Path, generator: Object) -> Object:
    lines = [line for name in generator["envs"] for line in (directory / name).read_text().splitlines()]
    pairs = [line.partition("=") for line in lines if line and not line.startswith("#")]
    data = {name: value for name, _, value in pairs}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generator["name"]}, "data": data}


def _is_target(one: Object, change: Object, target: Object | None) -> bool:
    if target is None:
        return bool((one["kind"], one["metadata"]["name"]) == (change["kind"], change["metadata"]["name"]))
    label, _, value = target["labelSelector"].partition("=")
    return bool(one["kind"] == target["kind"] and one["metadata"].get("labels", {}).get(label) == value)


def _merge(into: Object, change: Object) -> None:
    for name, value in change.items():
        if isinstance(value, dict) and name in into:
            _merge(into[name], value)
        elif name in MERGED_BY and name in into:
            key = MERGED_BY[name]
            present = {item[key]: item for item in into[name]}
            for item in value:
                if item[key] in present:
                    _merge(present[item[key]], item)
                else:
                    into[name].append(deepcopy(item))
        else:
            into[name] = deepcopy(value)


def _set_image(one: Object, image: Object) -> None:
    if one["kind"] in ("Deployment", "Job"):
        for container in containers(one):
            name, _, tag = container["image"].rpartition(":")
            if name == image["name"]:
                container["image"] = f"{image.get('newName', name)}:{image.get('newTag', tag)}"
