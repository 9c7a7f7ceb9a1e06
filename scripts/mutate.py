#!/usr/bin/env python
"""Mutation testing: change one operator or number of a module at a time and see whether its tests notice.

    .venv/bin/python scripts/mutate.py quant/packing.py tests/unit/test_quant_packing.py --most 60

Nothing is written: each mutant is compiled in memory and takes the module's place in a forked process that
runs the tests. What survives is printed with its line, to be killed by a test or understood. Messages of
errors, annotations and docstrings are left alone.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATIONS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr, ast.Pow: ast.Mult, ast.MatMult: ast.Add,
}  # fmt: skip


def _left_alone(tree: ast.AST) -> set[int]:
    """Nodes of docstrings, annotations, f-strings and raise statements."""
    found: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            found.add(id(body[0].value))
        for field in ("annotation", "returns"):
            value = getattr(node, field, None)
            if isinstance(value, ast.AST):
                found |= {id(inner) for inner in ast.walk(value)}
        if isinstance(node, (ast.JoinedStr, ast.Raise)):
            found |= {id(inner) for inner in ast.walk(node) if inner is not node}
    return found


def change(node: ast.AST) -> bool:
    """Mutate ``node`` in place; False where there is nothing to change."""
    target: Any = node
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        target.ops[0] = COMPARISONS[type(node.ops[0])]()
    elif isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in OPERATIONS:
        target.op = OPERATIONS[type(node.op)]()
    elif isinstance(node, ast.BoolOp):
        target.op = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        target.op = ast.UAdd()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        target.operand = ast.UnaryOp(ast.Not(), node.operand)
    elif isinstance(node, ast.IfExp):
        target.body, target.orelse = node.orelse, node.body
    elif isinstance(node, ast.If):
        target.test = ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        target.value = not node.value
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        target.value = node.value + 1
    elif isinstance(node, ast.Constant) and type(node.value) is float:
        target.value = node.value * 2 + 0.1
    else:
        return False
    return True


def sites(tree: ast.AST) -> list[int]:
    """Positions, in ``ast.walk``'s order, of what can be mutated."""
    skipped = _left_alone(tree)
    nodes = list(ast.walk(tree))
    return [n for n, node in enumerate(nodes) if id(node) not in skipped and change(copy.deepcopy(node))]


def mutant(tree: ast.AST, site: int) -> tuple[ast.AST, Any]:
    """A copy of the module's tree with one node changed, and that node."""
    changed = copy.deepcopy(tree)
    node = list(ast.walk(changed))[site]
    change(node)
    return ast.fix_missing_locations(changed), node


class _Loader(importlib.machinery.SourceFileLoader):
    """Gives a module other code than its file has."""

    def __init__(self, name: str, path: Path, code: CodeType) -> None:
        super().__init__(name, str(path))
        self.code = code

    def get_code(self, fullname: str) -> CodeType:
        return self.code


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, path: Path, code: CodeType) -> None:
        self.name, self.path, self.loader = name, path, _Loader(name, path, code)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        inside = [str(self.path.parent)] if self.path.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(
            fullname, self.path, loader=self.loader, submodule_search_locations=inside
        )


def survives(name: str, path: Path, tree: Any, tests: Sequence[str], limit: float) -> bool:
    """Whether the tests pass with ``tree`` in the module's place, within ``limit`` seconds."""
    code = compile(tree, str(path), "exec")
    child = os.fork()
    if child == 0:
        import pytest

        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        sys.meta_path.insert(0, _Finder(name, path, code))
        status = 9
        try:
            status = int(pytest.main([*tests, "-x", "-q", "-p", "no:cacheprovider", "--tb=no"]))
        finally:
            os._exit(status)
    ends = time.monotonic() + limit
    while time.monotonic() < ends:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="the module, e.g. quant/packing.py")
    parser.add_argument("tests", nargs="+", help="pytest's arguments: what should notice")
    parser.add_argument(
        "--most", type=int, default=1_000_000, help="mutants; a random choice of all there are"
    )
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no mutant after that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", help="only these, e.g. 20,123: to look at survivors again")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not importlib.import_module("torch").cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # as tests/conftest.py does, before triton is imported
    for module in ("pytest", "hypothesis", "torch._dynamo", "transformers.modeling_utils"):
        importlib.import_module(module)  # what most tests import is imported once, before the forks

    file: Path = arguments.file
    name = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
    text = file.read_text()
    tree = ast.parse(text)
    began = time.monotonic()
    if not survives(name, ROOT / file, tree, arguments.tests, 600):
        raise SystemExit(f"the tests fail without any change: {' '.join(arguments.tests)}")
    limit = 20 + 6 * (time.monotonic() - began)
    places = sites(tree)
    if arguments.lines is not None:
        lines = {int(line) for line in arguments.lines.split(",")}
        nodes: list[Any] = list(ast.walk(tree))
        places = [site for site in places if nodes[site].lineno in lines]
    chosen = random.Random(arguments.seed).sample(places, min(arguments.most, len(places)))
    tried = survived = 0
    began = time.monotonic()
    for site in chosen:
        if time.monotonic() - began > arguments.seconds:
            break
        changed, node = mutant(tree, site)
        tried += 1
        if survives(name, ROOT / file, changed, arguments.tests, limit):
            survived += 1
            line = text.splitlines()[node.lineno - 1].strip()
            print(f"survived {file}:{node.lineno}: {line[:90]}  ->  {ast.unparse(node)[:60]}", flush=True)
    print(f"{file}: {len(places)} places, {tried} mutants, {tried - survived} killed, {survived} survived")


if __name__ == "__main__":
    main()
