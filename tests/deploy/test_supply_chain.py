"""What is shipped is known: the bill of materials follows the lock, and every licence in it is permissive."""

import json
import re
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from scripts import sbom

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "requirements.txt").read_text()


def test_the_bill_of_materials_follows_the_lock() -> None:
    """Written anew it is the same, byte by byte; if not: scripts/sbom."""
    assert sbom.SBOM.read_text() == sbom.text()


def test_the_bill_of_materials_is_cyclonedx() -> None:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(sbom.SBOM.read_text()) is None
    broken = sbom.SBOM.read_text().replace('"library"', '"libary"', 1)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(broken) is not None


def test_the_bill_of_materials_names_every_package_and_what_needs_it() -> None:
    document = json.loads(sbom.SBOM.read_text())
    names = {component["name"] for component in document["components"]}
    in_lock = set(re.findall(r"^([a-z0-9-]+)==", LOCK, flags=re.MULTILINE))
    assert in_lock - names == {"colorama"}  # for Windows alone
    assert names <= in_lock
    assert all(component["licenses"] for component in document["components"])
    needed = {reference for one in document["dependencies"] for reference in one["dependsOn"]}
    components = {component["bom-ref"] for component in document["components"]}
    assert needed == components, "each is there because something needs it"


def test_every_file_that_may_be_installed_is_known_by_its_hash() -> None:
    packages = [part for part in re.split(r"^(?=[a-z0-9])", LOCK, flags=re.MULTILINE) if part]
    assert packages
    assert all("--hash=sha256:" in package for package in packages)
    assert "://" not in LOCK, "a lock names packages, not the place they come from"


@pytest.mark.parametrize(
    ("stated", "classifiers", "expression"),
    [
        ("MIT", (), "MIT"),
        ("Apache-2.0 AND MIT", (), "Apache-2.0 AND MIT"),
        ("(MIT OR Apache-2.0)", (), "(MIT OR Apache-2.0)"),
        ("ISC License", (), "ISC"),
        (None, ("License :: OSI Approved :: MIT License", "Topic :: Software Development"), "MIT"),
    ],
)
def test_a_permissive_licence_is_known(stated: str | None, classifiers: tuple[str, ...], expression: str) -> None:
    assert sbom.license_of("package", stated, classifiers) == expression


@pytest.mark.parametrize(
    ("stated", "classifiers"),
    [
        ("GPL-3.0-or-later", ()),
        ("MIT AND AGPL-3.0-only", ()),
        ("UNKNOWN", ()),
        (None, ()),
        (None, ("License :: OSI Approved :: GNU General Public License v3 (GPLv3)",)),
        ("Do what you want, but read this page of conditions first", ()),
    ],
)
def test_any_other_licence_is_refused_by_the_package_s_name(stated: str | None, classifiers: tuple[str, ...]) -> None:
    with pytest.raises(sbom.UnknownLicense, match=r"^the-package: "):
        sbom.license_of("the-package", stated, classifiers)
