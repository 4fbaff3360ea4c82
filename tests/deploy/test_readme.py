"""The README's claims: its commands run as they stand there, and its sentences have tests."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway import __version__, errors
from gateway.ingest import wire
from gateway.web import api, openapi
from testbed import Gateway, Servers

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
# The sentences of the README, with line breaks as spaces.
SENTENCES = " ".join(README.split())

# Each claim, and the test that shows it.
CLAIMS = {
    "Before a message is counted, it is persistent, routed, and confirmed by the broker.": (
        "integration/publisher/test_writing.py::test_messages_arrive_whole_in_order_persistent_and_mandatory",
        "integration/test_broker_outcomes.py::test_the_queue_holds_exactly_what_was_counted",
        "integration/test_broker_outcomes.py::test_what_cannot_be_routed_is_not_counted",
    ),
    "**No caller can send from a sending list of another account.**": (
        "properties/test_isolation.py::test_every_message_goes_out_from_a_list_of_its_senders_or_not_at_all",
    ),
    "A revoked key is refused on the next request.": (
        "integration/test_revocation.py::test_every_process_refuses_from_the_commit_of_a_revocation_on",
    ),
    "A batch of 1,000 takes two queries, one write, and one wait for its confirms.": (
        "integration/test_work_of_requests.py::test_a_batch_is_two_queries_one_write_and_one_future",
    ),
    "503 means that nothing was queued": ("integration/test_outages.py::test_a_killed_broker_means_503",),
    "An `Idempotency-Key` makes every retry safe.": (
        "api/test_idempotency.py::test_an_unknown_outcome_runs_again_elsewhere_with_the_same_ids",
    ),
    "It drops repeats for 25 hours.": ("examples/test_settings.py::test_the_defaults_are_those_of_the_readme",),
    "SIGTERM drains the process": ("integration/test_process.py::test_sigterm_loses_no_confirm",),
    "a real PostgreSQL, a real RabbitMQ, the gateway, two requests, and the messages in the queue": (
        "deploy/test_bare_debian.py::test_the_demo_runs_and_leaves_only_packages",
    ),
    "The servers that a command starts listen on 127.0.0.1 only": (
        "testbed/test_processes.py::test_a_server_listens_on_the_loopback_address_only",
    ),
    "They end with the command, which removes the folder.": (
        "examples/test_demo.py::test_what_the_demo_says_at_its_end_works_and_nothing_stays",
    ),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_stands_in_the_readme_and_has_a_test(claim: str) -> None:
    assert claim in SENTENCES, "the README says something else: does the test below show it?"
    for name in CLAIMS[claim]:
        file, _, function = name.partition("::")
        assert f"def {function}" in (ROOT / "tests" / file).read_text(), name


def test_the_calls_of_the_api_are_those_that_the_readme_names() -> None:
    document = json.loads((ROOT / "gateway/web/openapi.json").read_text())
    served = {path for path in api.ALLOWED if path.startswith("/api/")}
    assert served == {path for path in document["paths"] if path.startswith("/api/")} == {api.SEND, api.SEND_BULK}
    assert served == set(re.findall(r"/api/v\d/[a-z/]+", README))
    assert "The gateway has no other call of that API." in SENTENCES
    assert openapi.PATH in api.ALLOWED


def test_the_limit_of_a_batch_is_the_readmes() -> None:
    assert f"`POST {api.SEND_BULK}` takes up to {wire.MAX_MESSAGES:,} messages" in SENTENCES
    assert errors.TooManyMessages.status == 413


def test_the_speed_is_what_was_measured() -> None:
    speed = README.partition("\n## Speed\n")[2].partition("\n## ")[0]
    measured = (ROOT / "docs/evidence/performance.md").read_text()
    figures = re.findall(r"\d\.\d\d", speed)
    assert len(figures) >= 5
    assert [figure for figure in figures if figure not in measured] == []


def test_the_version_is_that_of_the_changelog_or_of_a_development_after_it() -> None:
    """Code with unreleased changes must not call itself a release: two programs would have one version."""
    _, unreleased, *sections = re.split(r"^## (?=\[)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    heading, _, changes = unreleased.partition("\n")
    assert heading == "[Unreleased]"
    releases = [re.match(r"\[(\d+)\.(\d+)\.(\d+)\] - \d{4}-\d\d-\d\d\n", section) for section in sections]
    assert all(releases)
    assert releases[0] is not None
    version = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)(\.dev\d+)?", __version__)
    assert version is not None
    *numbers, development = version.groups()
    released = list(map(int, releases[0].groups()))
    if changes.strip():
        assert development
        assert list(map(int, numbers)) > released
    else:
        assert (list(map(int, numbers)), development) == (released, None)


def test_every_image_in_documents_and_manifests_has_this_version() -> None:
    files = [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "deploy").rglob("*.yaml"),
        ROOT / "scripts/image",
    ]
    image = re.compile(r"sms-gateway:(\d+\.\d+\.\d+\S*)|newTag: (\d+\.\d+\.\d+\S*)")
    named = {(file.name, found[1] or found[2]) for file in files for found in image.finditer(file.read_text())}
    assert len(named) >= 5
    # CONTRIBUTING.md shows how the next release is made.
    assert {pair for pair in named if pair[1] != __version__ and pair[0] != "CONTRIBUTING.md"} == set()


def block(heading: str, language: str = "") -> str:
    """Return the first code block of a language below a heading."""
    section = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.search(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert found, f"{heading} has no such block"
    return found[1]


class Installed(Gateway):
    """A gateway by the README's own line, from an installed package: the source tree is not on Python's path."""

    def __init__(self, settings: dict[str, str], line: str) -> None:
        super().__init__(settings)
        self._line = line

    def _environment(self) -> dict[str, str]:
        environment = super()._environment()
        del environment["PYTHONPATH"]
        return environment

    def _command(self) -> list[str]:
        return ["/bin/sh", "-c", f"exec {self._line}"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the folder of a copy of the source, in which the README's first line was run. Needs the package index."""
    folder = tmp_path_factory.mktemp("installed")
    for name in ("gateway", "migrations", "pyproject.toml", "README.md"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, folder / name)
    run(block("Run").splitlines()[0], folder, dict(os.environ))
    # Only the installed package is left.
    shutil.rmtree(folder / "gateway")
    yield folder
    shutil.rmtree(folder)


def run(line: str, folder: Path, environment: dict[str, str]) -> str:
    """Run a line of the README in a folder and return what it printed."""
    done = subprocess.run(  # noqa: S603
        ["/bin/sh", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, f"{line} failed:\n{done.stdout}{done.stderr}"
    return done.stdout


def test_installed_by_pip_the_readmes_commands_run_and_its_request_has_its_answer(
    installed: Path, servers: Servers
) -> None:
    if servers.postgres is None:
        pytest.skip("the README's commands need an empty database")
    lines = [line.partition("#")[0].strip() for line in block("Run").splitlines()]
    _, export, *commands = lines
    assert [command.split()[:2] for command in commands] == [
        ["sms-gateway", name] for name in ("migrate", "account", "serve", "status")
    ]
    migrate, create_account, serve, status = commands
    assert set(re.findall(r"GATEWAY_\w+", export)) == {"GATEWAY_DATABASE_URL", "GATEWAY_AMQP_URL"}

    plain = {name: value for name, value in os.environ.items() if not name.startswith(("GATEWAY_", "PYTHON"))}
    settings = {
        "GATEWAY_DATABASE_URL": servers.postgres.create_database("readme"),
        "GATEWAY_AMQP_URL": servers.amqp_url,
        "GATEWAY_AMQP_EXCHANGE": "test.readme",
        "GATEWAY_AMQP_QUEUE": "test.readme",
        "PATH": f"{installed}/.venv/bin:{plain['PATH']}",
    }
    environment = plain | settings
    assert run("sms-gateway --version", installed, environment).strip() == __version__
    run(migrate, installed, environment)
    run(create_account, installed, environment)
    create_key, add_list = block("Run").partition("# then: ")[2].splitlines()[0].split(" · ")
    key = json.loads(run(f"sms-gateway {create_key} --json", installed, environment))["key"]
    run(f"sms-gateway {add_list}", installed, environment)

    with Installed(settings, serve) as gateway:
        request = block("Send").replace("http://127.0.0.1:8080", gateway.url).replace("trk_…", key)
        answer: dict[str, Any] = msgspec.json.decode(run(f"curl -s {request.removeprefix('curl')}", installed, plain))
        assert answer == json.loads(block("Send", "json"))
        ports = {"GATEWAY_OPS_PORT": str(gateway.ops_port)}
        printed = subprocess.run(  # noqa: S603
            ["/bin/sh", "-c", status],
            cwd=installed,
            env=environment | ports,
            capture_output=True,
            text=True,
            check=False,
        ).stdout
        assert "ready" in printed
        assert __version__ in printed
