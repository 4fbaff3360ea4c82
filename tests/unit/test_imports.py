"""The import rules of ARCHITECTURE.md, section "Imports", are read from there and enforced. Reads source only."""

import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "gateway"
SECTION = (ROOT / "ARCHITECTURE.md").read_text().partition("\n## Imports\n")[2].partition("\n## ")[0]

IO_CLOCK_AND_CHANCE = {
    *["asyncio", "socket", "threading", "os", "logging", "time", "datetime", "random", "secrets", "uuid"],
}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}


def layers() -> list[list[str]]:
    """Return the packages as ARCHITECTURE.md orders them: each may import those behind the next arrow, and no other."""
    (order,) = re.findall(r"^```\n(.+?)\n```$", SECTION, re.MULTILINE | re.DOTALL)
    return [re.split(r",\s*", layer.strip()) for layer in order.replace("\n", " ").split("→")]


def libraries() -> dict[str, set[str]]:
    """Return the table of libraries: each with the packages and modules that may import it."""
    rows = re.findall(r"^\| (`.+?) \| (`.+?) \|$", SECTION, re.MULTILINE)
    return {
        library: set(re.findall(r"`([\w.]+)`", allowed))
        for names, allowed in rows
        for library in re.findall(r"`(\w+)`", names)
    }


def pure() -> list[str]:
    """Return the modules that the section names as pure."""
    (sentence,) = re.findall(r"^Pure modules[^:]*: (.+?)\.$", SECTION, re.MULTILINE | re.DOTALL)
    return re.findall(r"`([\w.]+)`", sentence)


LAYER_OF = {package: depth for depth, packages in enumerate([["__main__"], *layers()]) for package in packages}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports_of(path: Path) -> set[str]:
    """Return full dotted names of all that is imported, at any depth of the source; `from a import b` gives a.b."""
    names: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import: write it out"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports_of(module: str) -> set[str]:
    """Return the modules of gateway that a module imports."""
    own = {name.removeprefix("gateway.") for name in imports_of(MODULES[module]) if name.startswith("gateway.")}
    return {known for known in MODULES for name in own if name == known or name.startswith(known + ".")}


def package_of(module: str) -> str:
    return module.partition(".")[0]


def libraries_of(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imports_of(MODULES[module])}


def test_the_source_and_the_rules_are_found() -> None:
    assert {"web.api", "amqp.publisher", "ingest.wire"} <= set(MODULES)
    assert own_imports_of("ingest.batch") >= {"ingest.wire", "errors"}
    assert libraries_of("web.metrics") >= {"prometheus_client", "gateway"}
    assert LAYER_OF["cli"] < LAYER_OF["web"] < LAYER_OF["ingest"] < LAYER_OF["errors"]
    assert libraries()["asyncpg"] >= {"postgres"}
    assert "ingest.wire" in pure()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_no_package_above_its_own(module: str) -> None:
    package = package_of(module)
    assert package in LAYER_OF, f"{package} is new: give it its place in ARCHITECTURE.md, section Imports"
    others = {known for known in own_imports_of(module) if package_of(known) != package}
    upwards = {known for known in others if LAYER_OF[package_of(known)] <= LAYER_OF[package]}
    assert not upwards, f"{module} imports {sorted(upwards)}: {package} stands below, or beside, those packages"


def test_no_module_of_the_repository_imports_itself_through_others() -> None:
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in ("gateway", "testbed", "benchmarks", "examples", "tests")
        for path in (ROOT / package).rglob("*.py")
    }
    graph = {}
    for module, path in modules.items():
        names = imports_of(path)  # of `from a import b`, a.b may be a module or a name in the module a
        graph[module] = {name if name in modules else name.rpartition(".")[0] for name in names} & modules.keys()
        graph[module].discard(module)
    assert graph["gateway.web.api"] >= {"gateway.ingest.pipeline"}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(("library", "allowed"), libraries().items())
def test_a_library_is_imported_only_where_the_table_says(library: str, allowed: set[str]) -> None:
    users = {module for module in MODULES if library in libraries_of(module)}
    strangers = {module for module in users if not {module, package_of(module)} & allowed}
    assert not strangers, f"{sorted(strangers)} import {library}, which is for {sorted(allowed)}"
    unused = {one for one in allowed if not any(one in (module, package_of(module)) for module in users)}
    assert not unused, f"ARCHITECTURE.md lets {sorted(unused)} import {library}, and they do not"


@pytest.mark.parametrize("package", ["gateway", "testbed", "examples", "benchmarks"])
def test_nothing_but_tests_imports_tests_nothing_but_benchmarks_benchmarks_and_nothing_scripts(package: str) -> None:
    forbidden = {"tests", "benchmarks", "scripts"} - {package}
    for path in sorted((ROOT / package).rglob("*.py")):
        roots = {name.partition(".")[0] for name in imports_of(path)}
        assert not roots & forbidden, f"{path.relative_to(ROOT)} imports {sorted(roots & forbidden)}"


def test_tests_import_nothing_from_scripts_and_only_their_own_import_benchmarks() -> None:
    for path in sorted((ROOT / "tests").rglob("*.py")):
        roots = {name.partition(".")[0] for name in imports_of(path)}
        assert "scripts" not in roots, path
        assert "benchmarks" not in roots or path.is_relative_to(ROOT / "tests" / "benchmarks"), path


def test_only_the_configuration_reads_the_environment() -> None:
    """One starts a child process, the migration tool, and hands the environment on to it.

    One looks for the OTEL_* variable that the SDK, which reads them itself, refuses.
    """
    readers = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(tree_of(path))
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "getenvb"))
        or (isinstance(node, ast.ImportFrom) and node.module == "os")
    }
    assert readers == {"config", "cli.migrations", "telemetry.tracing"}


@pytest.mark.parametrize("module", pure())
def test_a_pure_module_has_no_await_no_io_no_clock_and_no_randomness(module: str) -> None:
    waiting = (ast.AsyncFunctionDef, ast.AsyncFor, ast.AsyncWith, ast.Await)
    assert not [node for node in ast.walk(tree_of(MODULES[module])) if isinstance(node, waiting)]
    assert not libraries_of(module) & IO_CLOCK_AND_CHANCE


def functions_of(module: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree_of(MODULES[module])) if isinstance(node, kinds)]


@pytest.mark.parametrize("module", [module for module in MODULES if package_of(module) == "amqp"])
def test_no_function_to_the_broker_has_more_than_four_parameters_beside_self(module: str) -> None:
    for function in functions_of(module):
        parameters = [one.arg for one in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
        assert len([name for name in parameters if name not in ("self", "cls")]) <= 4, function.name


PACKAGES_ON_THE_PATH = ("web", "ingest", "amqp", "postgres")
ON_THE_PATH = [module for module in MODULES if package_of(module) in PACKAGES_ON_THE_PATH and module != "web.metrics"]


@pytest.mark.parametrize("module", ON_THE_PATH)
def test_no_function_on_the_way_of_a_request_is_longer_than_40_lines(module: str) -> None:
    """The docstring is not counted."""
    for function in functions_of(module):
        first = function.body[0]
        has_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        start = (first.end_lineno or 0) + 1 if has_docstring else first.lineno
        assert (function.end_lineno or 0) - start < 40, f"{function.name} in {module}"
