"""`__all__` tells the truth, and every module says what it is for."""

from __future__ import annotations

import ast
import importlib
import re

import pytest

from tests.architecture.source_tree import PROJECT, modules

NEEDS_EXTRA = ("quant.backends.triton", "quant.backends.bnb")


@pytest.mark.parametrize("name", list(modules()))
def test_module_has_docstring(name: str) -> None:
    assert ast.get_docstring(ast.parse(modules()[name].path.read_text())), f"{name} has no docstring"


@pytest.mark.parametrize("name", [n for n in modules() if not n.startswith(NEEDS_EXTRA)])
def test_all_is_true(name: str) -> None:
    module = importlib.import_module(name)
    public = getattr(module, "__all__", [])
    assert len(set(public)) == len(public)
    missing = [entry for entry in public if not hasattr(module, entry)]
    assert not missing


@pytest.mark.parametrize("name", ["quant", "qlora_engine"])
def test_package_declares_its_surface(name: str) -> None:
    package = importlib.import_module(name)
    assert package.__all__
    assert set(package.__all__) <= set(dir(package))
    undocumented = [entry for entry in package.__all__ if not getattr(package, entry).__doc__]
    assert not undocumented


def test_help_leads_to_public_names() -> None:
    """What `help(qlora_engine)` tells to look up is there, and its example comes from the same names."""
    package = importlib.import_module("qlora_engine")
    rows = re.findall(r"^    [a-z][a-z ]{3,15}  ([A-Za-z].*)$", str(package.__doc__), re.MULTILINE)
    named = {name for row in rows for name in row.split()}
    assert len(rows) == 7
    assert named <= set(package.__all__)
    assert {"LoraConfig", "LoftQConfig", "get_peft_model", "error_report"} <= named


@pytest.mark.parametrize("script", list(PROJECT["scripts"]))
def test_console_script_exists(script: str) -> None:
    module, function = PROJECT["scripts"][script].split(":")
    assert callable(getattr(importlib.import_module(module), function))
