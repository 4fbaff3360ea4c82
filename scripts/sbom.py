"""The software bill of materials: what the container image installs on top of its base, as CycloneDX 1.6 JSON.

    python -m scripts.sbom                 # writes sbom.cdx.json
    python -m scripts.sbom --to OTHER.json
    python -m scripts.sbom --licenses      # prints every package's licence

Versions come from requirements.txt, which holds the hashes of their files; licences and dependencies from the installed
packages' own metadata. The same lock gives the same bytes. A licence that is not known to be permissive is refused.
"""

import argparse
import hashlib
import json
import re
import sys
import tomllib
import uuid
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gateway import __version__

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ROOT / "requirements.txt"
SBOM = ROOT / "sbom.cdx.json"

# What the image is, for markers such as `sys_platform == 'win32'`; the machine that writes the file does not matter.
IMAGE = {
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "python_full_version": "3.13.0",
    "python_version": "3.13",
    "sys_platform": "linux",
    "extra": "",
}

PERMISSIVE = {"Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MIT", "PSF-2.0"}  # SPDX identifiers
SPDX = {  # how older metadata spells them
    "Apache 2.0": "Apache-2.0",
    "ISC License": "ISC",
    "MIT License": "MIT",
    "License :: OSI Approved :: Apache Software License": "Apache-2.0",
    "License :: OSI Approved :: BSD License": "BSD-3-Clause",  # Jinja2's has three clauses; either number is permissive
    "License :: OSI Approved :: ISC License (ISCL)": "ISC",
    "License :: OSI Approved :: MIT License": "MIT",
    "License :: OSI Approved :: Python Software Foundation License": "PSF-2.0",
}


class UnknownLicense(Exception):
    """A package whose licence is not known to be permissive. The text names it, and says what to do."""


def locked(lines: Iterable[str]) -> list[Requirement]:
    """What a lock file makes the image install."""
    requirements = [Requirement(line.removesuffix(" \\")) for line in lines if re.match(r"[a-z0-9]", line)]
    return [one for one in requirements if one.marker is None or one.marker.evaluate(IMAGE)]


def license_of(name: str, stated: str | None, classifiers: Iterable[str] = ()) -> str:
    """The licence as an SPDX expression. Raises UnknownLicense unless all of it is permissive."""
    choices = [stated] if stated else [one for one in classifiers if one.startswith("License ::")]
    expression = " AND ".join(SPDX.get(choice, choice) for choice in choices)
    identifiers = set(re.split(r"[()\s]+", expression)) - {"", "AND", "OR"}
    if not identifiers or not identifiers <= PERMISSIVE:
        raise UnknownLicense(
            f"{name}: the licence {expression[:80]!r} is not known to be permissive. Read it; then add it to "
            "PERMISSIVE or SPDX in scripts/sbom.py, or do without the package"
        )
    return expression


def licenses(requirements: Iterable[Requirement]) -> dict[str, str]:
    """Package → licence."""
    found = {}
    for one in requirements:
        facts: dict[str, Any] = metadata.metadata(one.name).json
        stated = facts.get("license_expression") or facts.get("license")
        found[one.name] = license_of(one.name, stated, facts.get("classifier", ()))
    return found


def bill(requirements: list[Requirement], lock: bytes) -> dict[str, Any]:
    """The document, as data."""
    reference = {one.name: f"pkg:pypi/{one.name}@{_version(one)}" for one in requirements}
    license_by_name = licenses(requirements)
    digest = hashlib.sha256(lock).hexdigest()
    own = f"pkg:generic/sms-gateway@{__version__}"
    direct = {canonicalize_name(Requirement(text).name) for text in _project_dependencies()}
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'{own}#{digest}')}",
        "version": 1,
        "metadata": {
            "component": {"type": "application", "bom-ref": own, "name": "sms-gateway", "version": __version__},
            "lifecycles": [{"phase": "build"}],
            "properties": [{"name": "requirements.txt:sha256", "value": digest}],
        },
        "components": [
            {
                "type": "library",
                "bom-ref": reference[one.name],
                "name": one.name,
                "version": _version(one),
                "purl": reference[one.name],
                "licenses": _license_choice(license_by_name[one.name]),
            }
            for one in requirements
        ],
        "dependencies": [
            {"ref": own, "dependsOn": [reference[name] for name in reference if name in direct]},
            *(
                {"ref": reference[name], "dependsOn": [reference[other] for other in reference if other in needed]}
                for name in reference
                for needed in [_needed_by(name)]
            ),
        ],
    }


def _version(requirement: Requirement) -> str:
    (pin,) = requirement.specifier
    return pin.version


def _license_choice(expression: str) -> list[dict[str, Any]]:
    return [{"expression": expression} if " " in expression else {"license": {"id": expression}}]


def _needed_by(name: str) -> set[str]:
    requirements = [Requirement(text) for text in metadata.requires(name) or ()]
    return {canonicalize_name(one.name) for one in requirements if one.marker is None or one.marker.evaluate(IMAGE)}


def _project_dependencies() -> list[str]:
    project: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["dependencies"]


def text() -> str:
    """The file's content."""
    lock = REQUIREMENTS.read_bytes()
    return json.dumps(bill(locked(lock.decode().splitlines()), lock), indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="The software bill of materials of the container image.")
    parser.add_argument("--to", type=Path, default=SBOM, help="the file to write")
    parser.add_argument("--licenses", action="store_true", help="print the licences instead")
    arguments = parser.parse_args()
    try:
        if arguments.licenses:
            for name, expression in licenses(locked(REQUIREMENTS.read_text().splitlines())).items():
                print(f"{name:20} {expression}")
        else:
            arguments.to.write_text(text())
    except UnknownLicense as error:
        sys.exit(f"sbom: {error}")


if __name__ == "__main__":
    main()
