"""The parts of scripts/: environments are made once and whole, the demo computes what it prints."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from scripts import demo, mutate
from tests.architecture.source_tree import PROJECT

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def make_env(target: Path, *steps: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    """env.sh's make_env with the interpreter that runs this test."""
    command = f'. "{SCRIPTS / "env.sh"}" && make_env "$@"'
    return subprocess.run(
        ["bash", "-c", command, "bash", str(target), *steps],
        env=os.environ | {"PYTHON": python},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_make_env_is_made_once_and_goes_on_after_an_interruption(tmp_path: Path) -> None:
    target = tmp_path / "venv"
    first = make_env(target)
    assert first.returncode == 0, first.stderr
    assert "is ready" in first.stdout
    assert make_env(target).stdout == ""  # its stamp says that it is whole

    (target / ".stamp").unlink()  # as an interrupted run leaves it
    kept = (target / "pyvenv.cfg").stat().st_ino
    assert "is ready" in make_env(target).stdout
    assert (target / "pyvenv.cfg").stat().st_ino == kept

    failing = make_env(target, "--no-index no-such-package-here")  # another step: not the same environment
    assert failing.returncode != 0
    assert "pip install --no-index no-such-package-here failed" in failing.stderr
    assert "no-such-package-here" not in (target / ".stamp").read_text()


def test_make_env_names_what_is_missing(tmp_path: Path) -> None:
    result = make_env(tmp_path / "venv", python="/nowhere/python")
    assert result.returncode != 0
    assert "Python 3.10 or newer is needed (tried: /nowhere/python)" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_scripts_parse() -> None:
    scripts = [path for path in SCRIPTS.iterdir() if path.is_file() and path.suffix != ".py"]
    assert {"demo", "env.sh", "matrix", "test"} <= {path.name for path in scripts}
    for path in [*scripts, SCRIPTS.parent / ".ci" / "run"]:
        subprocess.run(["bash", "-n", str(path)], check=True)


def test_demo_perplexity_is_the_models_own_loss(
    make_model: Callable[..., Any], make_tokenizer: Callable[[], Any]
) -> None:
    tokens = demo.text_windows(make_tokenizer())
    assert tokens.shape == (demo.WINDOWS, demo.LENGTH)
    assert len({tuple(row.tolist()) for row in tokens}) == demo.WINDOWS
    model = make_model("llama", max_position_embeddings=demo.LENGTH)
    with torch.no_grad():
        expected = model(input_ids=tokens, labels=tokens).loss.exp().item()
    assert demo.perplexity(model, tokens) == pytest.approx(expected, rel=1e-5)


def test_demo_error_table_takes_geometric_means() -> None:
    layers = [
        {"name": "m.0.up", "error_plain": 0.04, "error": 0.02},
        {"name": "m.1.up", "error_plain": 0.09, "error": 0.08},
        {"name": "m.0.down", "error_plain": 0.06, "error": 0.06},
    ]
    rows = {line.split()[0]: line.split() for line in demo.error_table({"layers": layers}).splitlines()}
    assert rows["up"] == ["up", "2", "0.0600", "0.0400", "33.3%"]
    assert rows["down"] == ["down", "1", "0.0600", "0.0600", "0.0%"]
    assert rows["all"][2:] == ["3", "0.0600", "0.0458", "23.7%"]


def test_demo_trains_and_measures_on_different_topics(tmp_path: Path) -> None:
    train, held_out = (
        [json.loads(line)["text"] for line in path.read_text().splitlines()]
        for path in demo.write_rows(tmp_path)
    )
    assert len(train) > 4 * len(held_out) > 0
    topics = demo.python_topics()
    assert sum(map(len, train)) > 0.99 * sum(len(t) for i, t in enumerate(topics) if i % 8)
    assert all(any(text in topic for topic in topics[::8]) for text in held_out)
    assert not {*train} & {*held_out}
    assert all(text.strip() for text in train + held_out)


def test_demo_pieces_are_whole_lines() -> None:
    text = "".join(f"line {i}\n" for i in range(40))
    assert "".join(demo.pieces(text, 50)) == text
    assert all(len(piece) >= 50 for piece in demo.pieces(text, 50)[:-1])
    assert demo.pieces("  \n\n", 50) == []


def test_mutants_change_one_thing_and_leave_words_alone() -> None:
    text = '''"""Doc 1 + 1."""
def f(a: int = 1, b: "Annotated[int, 2]" = 0.5) -> bool:
    """Doc: 3 > 2."""
    if not a:
        raise ValueError(f"{a + 1} of {b}")
    c = a // b if a is not b and True else -a
    c <<= 2
    return a <= c
'''
    tree = ast.parse(text)
    plain = ast.unparse(tree).splitlines()
    changes = []
    for site in mutate.sites(tree):
        changed, _ = mutate.mutant(tree, site)
        compile(changed, "f", "exec")  # type: ignore[arg-type]
        lines = ast.unparse(changed).splitlines()
        different = [line.strip() for line, before in zip(lines, plain, strict=True) if line != before]
        assert len(different) == 1
        changes += different
    assert ast.unparse(tree).splitlines() == plain
    assert sorted(changes) == sorted(
        [
            "def f(a: int=2, b: 'Annotated[int, 2]'=0.5) -> bool:",
            "def f(a: int=1, b: 'Annotated[int, 2]'=1.1) -> bool:",
            "if not not a:",
            "if not not a:",
            "c = a * b if a is not b and True else -a",
            "c = -a if a is not b and True else a // b",
            "c = a // b if a is not b or True else -a",
            "c = a // b if a is b and True else -a",
            "c = a // b if a is not b and False else -a",
            "c = a // b if a is not b and True else +a",
            "c >>= 2",
            "c <<= 3",
            "return a < c",
        ]
    )


def test_the_oldest_row_pins_the_lower_bounds() -> None:
    """Every one but liger-kernel's, which a machine without a GPU has no use for, and other Pythons'."""
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *(word for name in extras if name != "dev" for word in extras[name])]
    bounds = {}
    for requirement in map(Requirement, wanted):
        if requirement.name != "liger-kernel" and requirement.marker is None:
            (bound,) = requirement.specifier
            assert bound.operator == ">=", requirement
            bounds[requirement.name] = Version(bound.version)
    (row,) = [line for line in (SCRIPTS / "matrix").read_text().splitlines() if line.startswith("oldest|")]
    pins = [Requirement(word) for part in row.split("|")[1:3] for word in part.split()]
    pinned = {pin.name: Version(str(pin.specifier).removeprefix("==")) for pin in pins}
    assert bounds.pop("triton") == Version("3.2")  # torch 2.6 asks for it
    pinned.pop("peft")
    assert pinned == bounds
