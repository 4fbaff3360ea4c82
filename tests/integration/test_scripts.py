"""The scripts that run private servers install them, whatever the environment names."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHOW_URLS = """#!/bin/sh
echo "$(basename "$0"): ${GATEWAY_DATABASE_URL-none} ${GATEWAY_AMQP_URL-none}"
"""


@pytest.mark.parametrize("name", ["demo", "services"])
def test_scripts_that_run_private_servers_install_rabbitmq_also_if_the_environment_names_one(
    name: str, tmp_path: Path
) -> None:
    for program in (tmp_path / "scripts/setup", tmp_path / "bin/python"):
        program.parent.mkdir()
        program.write_text(SHOW_URLS)
        program.chmod(0o755)
    script = shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    environment = {
        "PATH": "/usr/bin:/bin",
        "VENV": str(tmp_path),
        "GATEWAY_DATABASE_URL": "postgres://user@127.0.0.1:1/gateway",
        "GATEWAY_AMQP_URL": "amqp://127.0.0.1:1/",
    }
    done = subprocess.run([script], env=environment, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
    assert done.stdout == "setup: none none\npython: none none\n"
