"""What README.md and CONTRIBUTING.md show is run: commands in order in an empty folder, then the Python."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.architecture.source_tree import PROJECT, ROOT

DOCUMENTS = ("README.md", "CONTRIBUTING.md")


def _blocks(document: str, language: str) -> Iterator[str]:
    """Fenced blocks of a language, in order."""
    yield from re.findall(
        rf"^```{language}\n(.*?)^```$", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL
    )


def _commands(document: str) -> list[list[str]]:
    """The lines of the ``bash`` blocks as words, comments and continuation lines taken care of."""
    text = "\n".join(_blocks(document, "bash")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    make_checkpoint: Callable[..., Path],
) -> Path:
    """Where a reader would stand: with a model of their own in `my-model` and a text of their own."""
    home = tmp_path_factory.mktemp("reader")
    shutil.copytree(make_checkpoint("llama"), home / "my-model")
    (home / "my-text.txt").write_text((ROOT / "LICENSE").read_text())
    return home


def _run(arguments: list[str], cwd: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
    return done.stdout


def test_readme_commands_run(folder: Path) -> None:
    """Every command of ours in the README, in its order, on a small model."""
    ran = 0
    for name, *arguments in _commands("README.md"):
        if name in PROJECT["scripts"]:
            module, function = PROJECT["scripts"][name].split(":")
            code = (
                f"import sys; from {module} import {function}; sys.argv[0] = {name!r}; sys.exit({function}())"
            )
            _run(["-c", code, *arguments], folder)
            ran += 1
    assert ran >= 1


def test_readme_python_runs(folder: Path, make_checkpoint: Callable[..., Path]) -> None:
    """The Python blocks, one after the other in one interpreter, as a reader would type them."""
    pytest.importorskip("peft")
    blocks = list(_blocks("README.md", "python"))
    assert blocks
    _run(["-c", "\n".join(blocks)], folder)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_other_commands_exist(document: str) -> None:
    known = {"git", "cd", "pip", "pre-commit", "source", *PROJECT["scripts"]}
    for name, *arguments in _commands(document):
        if "=" in name:  # a variable before the command
            name, *arguments = arguments
        if name.startswith("scripts/"):
            assert os.access(ROOT / name, os.X_OK), name
        elif name == "python":
            assert arguments[0] == "-m", arguments
            module = importlib.import_module(arguments[1])
            options = {word for word in arguments[2:] if word.startswith("--")}
            shown = _run(["-m", arguments[1], "--help"], ROOT)
            assert module.main
            assert all(option in shown for option in options), (options, shown)
        else:
            assert name in known, f"{document}: {name}"


def test_links_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text()):
            if not target.startswith(("http:", "https:")):
                assert (ROOT / target).exists(), f"{document}: {target}"


def test_files_in_the_picture_exist() -> None:
    """Every file and folder of the README's "How it is built", below the folder that it stands under."""
    (picture,) = (block for block in _blocks("README.md", "text") if block.startswith("quant/ "))
    folder, found = ROOT, 0
    for line in picture.splitlines():
        names = re.match(r" *((?:[\w*]+(?:\.py|/) ?)+)", line)
        assert names, line
        if not line.startswith(" "):
            folder = ROOT
        for name in names[1].split():
            assert list(folder.glob(name)), line
            found += 1
        if not line.startswith(" "):
            folder = ROOT / names[1].strip()
    assert found > 20


def test_no_machine_is_named() -> None:
    """Documents and scripts hold for every machine: no absolute path of one, no host of a package index."""
    files = [ROOT / name for name in (*DOCUMENTS, "CHANGELOG.md", "pyproject.toml", ".ci/run")]
    files += [path for path in (ROOT / "scripts").iterdir() if path.is_file()]
    for path in files:
        assert not re.search(r"/(work|root|home)/|pythonhosted|pypi\.org", path.read_text()), path
