"""Keeps the architecture: who may import whom, and which library is known to which module. Reads the source only."""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "gateway"

# A module imports only what stands in a later line. `gateway` itself (the version) may be imported by all.
LAYERS = [
    ["__main__"],
    ["server"],
    ["app", "listeners", "unix_sockets", "workers"],
    ["documents"],
    ["api", "health", "metrics", "status", "tail"],
    ["runtime"],
    ["admin", "id_supply", "idempotency", "tracing", "watching"],
    ["access", "auth"],
    ["store", "amqp.publisher", "batch", "admission", "measurements"],
    ["grouped", "database", "amqp.connection"],
    ["amqp.confirms", "amqp.frames", "amqp.window", "envelopes", "wire", "message_ids", "tls"],
    ["errors", "config", "log"],
]
LAYER_OF = {module: depth for depth, modules in enumerate(LAYERS) for module in modules}

KNOWN_ONLY_TO = {
    "aiohttp": {
        *[
            "server",
            "app",
            "listeners",
            "workers",
            "documents",
            "api",
            "health",
            "metrics",
            "status",
            "tail",
            "runtime",
        ],
    },
    "asyncpg": {"database", "admin", "status"},
    "aio_pika": {"amqp.connection", "status"},
    "aiormq": {"amqp.connection", "status"},
    "prometheus_client": {"metrics"},
    "uvloop": {"server"},
    "opentelemetry": {"tracing"},
}

PURE = ["batch", "envelopes", "wire", "message_ids", "amqp.frames", "amqp.confirms", "amqp.window"]
IO_CLOCK_AND_CHANCE = {
    *["asyncio", "socket", "threading", "os", "logging", "time", "datetime", "random", "secrets", "uuid"],
}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def imports_of(tree: ast.AST) -> set[str]:
    """Full dotted names of all that is imported, at any depth of the source; `from a import b` gives a.b."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import: write it out"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports_of(module: str) -> set[str]:
    """The modules of gateway that a module imports."""
    own = {name.removeprefix("gateway.") for name in imports_of(tree_of(module)) if name.startswith("gateway.")}
    return {known for known in MODULES for name in own if name == known or name.startswith(known + ".")}


def libraries_of(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imports_of(tree_of(module))}


def test_the_source_is_found() -> None:
    assert {"__main__", "api", "amqp.publisher", "wire"} <= set(MODULES)
    assert own_imports_of("api") >= {"batch", "wire", "errors", "amqp.confirms"}
    assert libraries_of("auth") >= {"hashlib", "multidict", "gateway"}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_stands_below_it(module: str) -> None:
    assert module in LAYER_OF, f"{module} is new: give it its place in LAYERS, and in ARCHITECTURE.md"
    upwards = {known for known in own_imports_of(module) if LAYER_OF[known] <= LAYER_OF[module]}
    assert not upwards, f"{module} imports {upwards}, which does not stand below it"


@pytest.mark.parametrize(("library", "allowed"), KNOWN_ONLY_TO.items())
def test_a_library_is_known_only_to_its_modules(library: str, allowed: set[str]) -> None:
    assert {module for module in MODULES if library in libraries_of(module)} == allowed


def test_only_the_configuration_reads_the_environment() -> None:
    """And those who start child processes (the migration tool, the workers) hand it on to them."""
    readers = {
        module
        for module in MODULES
        for node in ast.walk(tree_of(module))
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "getenvb"))
        or (isinstance(node, ast.ImportFrom) and node.module == "os")
    }
    assert readers == {"config", "__main__", "workers"}


@pytest.mark.parametrize("module", PURE)
def test_a_pure_module_waits_for_nothing_and_knows_no_clock_and_no_chance(module: str) -> None:
    waiting = (ast.AsyncFunctionDef, ast.AsyncFor, ast.AsyncWith, ast.Await)
    assert not [node for node in ast.walk(tree_of(module)) if isinstance(node, waiting)]
    assert not libraries_of(module) & IO_CLOCK_AND_CHANCE
