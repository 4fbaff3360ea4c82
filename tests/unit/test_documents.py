"""The documents list all that exists, and nothing else: settings, codes, commands, modules, links."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import msgspec
import pytest
from typer.main import get_command

from gateway import errors
from gateway.cli.commands import app
from gateway.config import PREFIX, Settings
from gateway.web.connections import LAST_ANSWERS_S, LAST_ANSWERS_SHARE

ROOT = Path(__file__).parents[2]
SETTINGS = (ROOT / "docs/settings.md").read_text()
API = (ROOT / "docs/api.md").read_text()
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()

NumericType = msgspec.inspect.IntType | msgspec.inspect.FloatType
DEFAULTS = Settings(database_url="", amqp_url="")
NUMERIC = {
    name: kind
    for name, kind in zip(
        Settings.__struct_fields__,
        msgspec.inspect.multi_type_info(get_type_hints(Settings, include_extras=True).values()),
        strict=True,
    )
    if isinstance(kind, NumericType)
}

REFUSALS = {value.code for value in vars(errors).values() if isinstance(value, errors.RowError)}
REQUEST_ERRORS = {
    kind.code
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.GatewayError) and hasattr(kind, "code")
}


FOLDERS = ("docs", "benchmarks", "deploy", "examples")
PAGES = [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]
CODE = ("gateway", "testbed", "benchmarks", "examples", "tests")
INTERROGATIVE = re.compile(r"(?:what|who|whether|how|where)(?:ever)?\b", re.IGNORECASE)
MAX_LINE = 120  # characters
OPERATIONS = (ROOT / "docs/operations.md").read_text()
COMMANDS = re.findall(r"^python -m gateway (.+)$", OPERATIONS, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_into_a_page_lead_to_a_heading(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]*)#([^)]+)\)", page.read_text(encoding="utf-8"))
    local = [(page.parent / link if link else page, anchor) for link, anchor in links if "://" not in link]
    assert [f"{target}#{anchor}" for target, anchor in local if anchor not in anchors_of(target)] == []


def test_the_readme_is_no_longer_than_two_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100


def test_the_map_of_the_code_is_no_longer_than_150_lines() -> None:
    assert len(ARCHITECTURE.splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_lines_are_at_most_120_characters_long_outside_tables(page: Path) -> None:
    lines = enumerate(page.read_text(encoding="utf-8").splitlines(), start=1)
    assert [number for number, line in lines if len(line) > MAX_LINE and not line.lstrip().startswith("|")] == []


def test_no_docstring_begins_with_an_interrogative_word() -> None:
    """A first line says what a thing is or does: a question word announces a riddle."""
    found = [
        f"{path.relative_to(ROOT)}: {docstring.splitlines()[0]}"
        for package in CODE
        for path in sorted((ROOT / package).rglob("*.py"))
        for docstring in docstrings_of(path)
        if INTERROGATIVE.match(docstring)
    ]
    assert found == []


def docstrings_of(path: Path) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and its functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_for_operators_are_commands(line: str) -> None:
    """The command line parses them; tests/integration runs them."""
    group = get_command(app)
    name, *arguments = shlex.split(line)
    if name != "--version":
        command = group.get_command(group.make_context("gateway", [name]), name)  # type: ignore[attr-defined]
        command.make_context(name, arguments)


@pytest.mark.parametrize("name", Settings.__struct_fields__)
def test_every_setting_is_documented(name: str) -> None:
    assert f"`{PREFIX}{name.upper()}`" in SETTINGS


@pytest.mark.parametrize("name", NUMERIC)
def test_the_default_and_the_range_of_a_numeric_setting_are_those_of_the_code(name: str) -> None:
    row = re.search(rf"^\| `{PREFIX}{name.upper()}` \| `([^`]+)`[^|]* \| ([^|]+) \|", SETTINGS, re.MULTILINE)
    assert row, "no row of its own"
    assert (row[1], row[2]) == (f"{getattr(DEFAULTS, name):.15g}", range_of(NUMERIC[name]))


def range_of(kind: NumericType) -> str:
    """Return the allowed values as the document writes them."""
    if kind.le is None:
        return f"at least {kind.ge:,}"
    return f"above {kind.gt:,} to {kind.le:,}" if kind.ge is None else f"{kind.ge:,} to {kind.le:,}"


def test_the_times_of_a_drain_are_those_of_the_code() -> None:
    slowest_s = DEFAULTS.database_timeout_s + DEFAULTS.body_timeout_s + DEFAULTS.confirm_timeout_s
    served_s = DEFAULTS.drain_timeout_s - LAST_ANSWERS_S
    assert LAST_ANSWERS_SHARE * DEFAULTS.drain_timeout_s >= LAST_ANSWERS_S
    section = OPERATIONS.partition("\n## Start and stop\n")[2].partition("\n## ")[0]
    for said in (
        f"`GATEWAY_DRAIN_DELAY_S` ({DEFAULTS.drain_delay_s:g} s)",
        f"`GATEWAY_DRAIN_TIMEOUT_S` ({DEFAULTS.drain_timeout_s:g} s)",
        f"After {served_s:g} s",
        f"{DEFAULTS.drain_delay_s + DEFAULTS.drain_timeout_s + 10:g} s with the defaults. Step 4",
        f"{slowest_s:g} s with the defaults, of which a drain gives it {served_s:g} s",
        f"`GATEWAY_DRAIN_TIMEOUT_S={slowest_s + LAST_ANSWERS_S:g}`",
        f"a grace period of {slowest_s + LAST_ANSWERS_S - DEFAULTS.drain_timeout_s:g} s more",
    ):
        assert said in section


@pytest.mark.parametrize("code", sorted(REFUSALS | REQUEST_ERRORS))
def test_every_code_is_documented(code: str) -> None:
    assert f"`{code}`" in API


def test_every_sentence_of_a_refusal_is_documented_with_its_code() -> None:
    refusals = [(kind.code, kind.sentence) for kind in errors.kinds()]
    refusals += [(error.code, error.sentence) for error in errors.row_errors()]
    assert [row for row in refusals if f"| `{row[0]}` | {row[1]}" not in API] == []


@pytest.mark.parametrize("code", sorted(REQUEST_ERRORS))
def test_the_tree_in_errors_py_has_every_request_level_code(code: str) -> None:
    assert code in (errors.__doc__ or "")


@pytest.mark.parametrize(
    "module", sorted(path.stem for path in (ROOT / "gateway").rglob("*.py") if path.stem != "__init__")
)
def test_the_map_shows_every_module(module: str) -> None:
    assert f"{module}.py" in ARCHITECTURE
