"""The mutations of one module: small edits of its source, each of which should make a test fail. No IO.

cosmic-ray and mutmut have the operators on expressions. Neither removes a statement, or a condition of a query.
"""

import ast
import re
from collections.abc import Iterator
from copy import copy
from typing import Any, NamedTuple

PAIRS: list[tuple[type[ast.AST], type[ast.AST]]] = [
    *[(ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.In, ast.NotIn)],
    *[(ast.Add, ast.Sub), (ast.Mult, ast.Div)],
]
SWAPS = dict(PAIRS) | {second: first for first, second in PAIRS} | {ast.FloorDiv: ast.Mult}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
SQL_CONDITION = re.compile(r"\bAND\b(?:(?!\bAND\b)[^\n)])*|\bWHERE\b[^\n)]*|\bORDER BY [^\n)]*|\bSKIP LOCKED\b")


class Edit(NamedTuple):
    """One mutation: the text from `start` to `end`, in characters, becomes `text`."""

    start: int
    end: int
    text: str

    def apply(self, source: str) -> str:
        """Return the mutated source."""
        return source[: self.start] + self.text + source[self.end :]

    def describe(self, source: str) -> str:
        """Return the lines of the edit before and after it, as one line."""
        start, end = source.rfind("\n", 0, self.start) + 1, source.find("\n", self.end)
        old, new = source[start:end], Edit(self.start - start, self.end - start, self.text).apply(source[start:end])
        return f"{' '.join(old.split())} → {' '.join(new.split())}"


def edits_of(source: str) -> list[Edit]:
    """Return all mutations of a module, in the order of its text."""
    lines = source.splitlines(keepends=True)

    def offset(line: int, column: int) -> int:
        # ast counts lines from 1, and columns in bytes.
        return sum(map(len, lines[: line - 1])) + len(lines[line - 1].encode()[:column].decode())

    edits = set()
    for node in _nodes(ast.parse(source)):
        for target, text in _mutations(node):
            start = offset(target.lineno, target.col_offset)
            end = offset(target.end_lineno or 0, target.end_col_offset or 0)
            if text:
                edits.add(Edit(start, end, text))
            else:
                found = SQL_CONDITION.finditer(source[start:end])
                edits |= {Edit(start + each.start(), start + each.end(), "") for each in found}
    return sorted(edits)


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes but those of texts for people: docstrings, log lines, f-strings, asserts."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.JoinedStr() | ast.Assert() | ast.Expr(value=ast.Constant()) | ast.FunctionDef(name="__repr__"):
                continue
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="log")))):
                continue
        yield child
        yield from _nodes(child)


def _mutations(node: ast.AST) -> Iterator[tuple[Any, str]]:
    """Yield pairs of a node and the text in its place; an empty text for a string, which may be a query."""
    match node:
        case ast.Expr() | ast.Raise() | ast.Delete() | ast.Continue() | ast.Break():
            yield node, "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]) | ast.AugAssign():
            yield node, "pass"
        case ast.Return(value=ast.expr() as value) if ast.unparse(value) != "None":
            yield node, "return None"
        case ast.If(test=test) | ast.IfExp(test=test):
            yield from ((test, "True"), (test, "False"))
        case ast.comprehension(ifs=tests):
            yield from ((test, "True") for test in tests)
        case ast.BoolOp(op=ast.And() | ast.Or() as joint, values=values):
            yield from ((value, str(isinstance(joint, ast.And))) for value in values)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield node, f"({ast.unparse(operand)})"
        case ast.Call(func=ast.Name(id=name)) if name in NAMES:
            yield node.func, NAMES[name]
        case ast.keyword(arg=str()):
            yield node, "**{}"
        case ast.Constant(value=bool() as truth):
            yield node, str(not truth)
        case ast.Constant(value=int() | float() as number):
            yield node, repr(number + 1 if isinstance(number, int) else number * 2 or 1.0)
        case ast.Constant(value=str()):
            yield node, ""
        case ast.Compare(ops=ops):
            for place, op in enumerate(ops):
                yield node, _text(node, ops=[*ops[:place], SWAPS[type(op)](), *ops[place + 1 :]])
    match node:
        case ast.BinOp(op=sign) | ast.AugAssign(op=sign) if type(sign) in SWAPS:
            yield node, _text(node, op=SWAPS[type(sign)]())


def _text(node: ast.AST, **changes: Any) -> str:
    changed = copy(node)
    for name, value in changes.items():
        setattr(changed, name, value)
    text = ast.unparse(changed)
    return text if isinstance(node, ast.stmt) else f"({text})"
