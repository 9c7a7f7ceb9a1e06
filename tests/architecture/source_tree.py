"""What the source files import, read from their syntax trees without running them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("quant", "qlora_engine")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@dataclass(frozen=True)
class Module:
    """A source file, with the dotted names that it imports anywhere, and those that it imports at once.

    "At once" is when the module itself is imported: not inside a function, not for type checking only.
    """

    name: str
    path: Path
    imports: frozenset[str]
    imports_at_once: frozenset[str]

    def third_party(self) -> set[str]:
        """Top-level names of everything imported that is not one of our packages."""
        return {name.split(".")[0] for name in self.imports} - set(PACKAGES)


def _names(node: ast.AST, package: str) -> Iterator[str]:
    """Dotted names that one import statement asks for; ``from a import b`` asks for ``a`` and ``a.b``."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parents = package.split(".")
        base = parents[: len(parents) - node.level + 1] if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        yield module
        yield from (f"{module}.{alias.name}" for alias in node.names)


def _runs_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """``node`` and all below it that runs when the module is imported."""
    yield node
    for child in ast.iter_child_nodes(node):
        function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        types_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not function and not types_only:
            yield from _runs_at_import(child)


@cache
def modules() -> dict[str, Module]:
    """Every module of our packages by dotted name."""
    found = {}
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        parent = name if is_package else name.rpartition(".")[0]
        tree = ast.parse(path.read_text())
        every = frozenset(name for node in ast.walk(tree) for name in _names(node, parent))
        at_once = frozenset(name for node in _runs_at_import(tree) for name in _names(node, parent))
        found[name] = Module(name, path, every, at_once)
    return found


def ours(targets: frozenset[str]) -> set[str]:
    """The modules of ours among imported names."""
    return targets & modules().keys()
