"""The mutants of a module, with the operators of cosmic-ray."""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

PACKAGE: Final = "sqlalchemy_kravn_crypto"


@dataclass(frozen=True, order=True)
class Change:
    """What a mutant changes, told without line numbers, so that it stays the same when other lines come and go."""

    module: str
    function: str
    before: str
    after: str


@dataclass(frozen=True)
class Mutant:
    """A module with one change."""

    change: Change
    source: str


def path_of(module: str) -> Path:
    """Return where the source of a module of the package is, without importing the package."""
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None:
        message = f"{PACKAGE} is not to be found; run this from the root of the checkout"
        raise LookupError(message)
    return Path(package.origin).parent.joinpath(*module.split(".")).with_suffix(".py")


def mutants_of(module: str) -> list[Mutant]:
    """Return all mutants of a module, each once."""
    source = path_of(module).read_text(encoding="utf-8")
    original = _program(source)
    found: dict[str, Mutant] = {}
    for name in operator_names():
        operator = get_operator(name)
        if operator.arguments():
            continue  # those want to be told which variables there are
        count = sum(len(list(operator().mutation_positions(node))) for node in ast_nodes(get_ast(source)))
        for occurrence in range(count):
            mutated = mutate_code(source, operator(), occurrence)
            try:
                program = _program(mutated)
            except SyntaxError:
                continue
            if program != original and program not in found:
                found[program] = Mutant(_change(module, source, mutated), mutated)
    return list(found.values())


def _program(source: str) -> str:
    """Return what of a module is executed: not its annotations, which Python keeps as text, nor its layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.arguments):
            # Which arguments are given by keyword is the type checker's to see: `*` as `/` is no other program.
            node.args = [*node.posonlyargs, *node.args, *node.kwonlyargs]
            node.defaults += [default for default in node.kw_defaults if default is not None]
            node.posonlyargs, node.kwonlyargs, node.kw_defaults = [], [], []
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


def _change(module: str, before: str, after: str) -> Change:
    lines, changed = before.splitlines(), after.splitlines()
    blocks = difflib.SequenceMatcher(None, lines, changed, autojunk=False).get_opcodes()
    _, start, end, new_start, new_end = next(block for block in blocks if block[0] != "equal")
    function = next(_enclosing(ast.parse(before), start + 1), "module")
    return Change(module, function, _text(lines[start:end]), _text(changed[new_start:new_end]))


def _text(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())


def _enclosing(tree: ast.AST, line: int) -> Iterator[str]:
    """Yield the qualified name of the innermost function or class that a line is in, if there is one."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if first <= line <= (node.end_lineno or node.lineno):
                inner = next(_enclosing(node, line), "")
                yield f"{node.name}.{inner}" if inner else node.name
        else:
            yield from _enclosing(node, line)
