"""The workspace: what may be begun, resumed, replaced, and what is left behind. Kills: tests/cli."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from qlora_engine.errors import InputError
from qlora_engine.files import Busy
from qlora_engine.workspace import Workspace

RUN = {"options": {"rank": 4}, "input": {"a": "1"}}


def complete(workspace: Workspace, text: str = "new") -> None:
    (workspace.result / "file.txt").write_text(text)
    workspace.finish()
    workspace.publish()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "out"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_output_appears_as_a_whole(out: Path) -> None:
    workspace = Workspace.open(out, RUN)
    assert not out.exists()
    assert names(workspace.root) == ["lock", "pieces", "result", "run.json"]
    complete(workspace)
    assert names(out) == ["file.txt"]
    assert names(out.parent) == ["out"]


def test_an_empty_folder_may_be_filled(out: Path) -> None:
    out.mkdir(parents=True)
    complete(Workspace.open(out, RUN))
    assert names(out) == ["file.txt"]


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    complete(Workspace.open(tmp_path / "link", RUN))
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == ["file.txt"]


@pytest.mark.parametrize("flags", [{}, {"resume": True}])
def test_what_is_there_is_not_replaced_unasked(out: Path, flags: dict[str, bool]) -> None:
    complete(Workspace.open(out, RUN), "old")
    with pytest.raises(InputError, match="exists and is not empty"):
        Workspace.open(out, RUN, **flags)
    assert names(out.parent) == ["out"]
    complete(Workspace.open(out, RUN, overwrite=True), "new")
    assert (out / "file.txt").read_text() == "new"


def test_consent_to_replace_outlives_the_process(out: Path) -> None:
    complete(Workspace.open(out, RUN), "old")
    Workspace.open(out, RUN, overwrite=True).close(remove=False)
    complete(Workspace.open(out, RUN, resume=True), "new")
    assert (out / "file.txt").read_text() == "new"


def test_resume_does_not_replace_what_came_meanwhile(out: Path) -> None:
    Workspace.open(out, RUN).close(remove=False)
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not empty"):
        Workspace.open(out, RUN, resume=True)
    assert names(out) == ["mine.txt"]


@pytest.mark.parametrize("resumed", [False, True])
def test_what_came_while_the_run_went_on_is_not_replaced(out: Path, resumed: bool) -> None:
    workspace = Workspace.open(out, RUN)
    if resumed:
        workspace.close(remove=False)
        workspace = Workspace.open(out, RUN, resume=True)
    (workspace.result / "file.txt").write_text("new")
    workspace.finish()
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"the output is whole in .*/done"):
        workspace.publish()
    workspace.close(remove=False)
    assert names(out) == ["mine.txt"]
    (out / "mine.txt").rename(out.parent / "mine.txt")
    again = Workspace.open(out, RUN, resume=True)
    assert again.is_done
    again.publish()
    assert names(out) == ["file.txt"]


@pytest.mark.parametrize("kind", ["link", "file", "folder"])
def test_another_folder_under_the_name_of_the_workspace_is_left_alone(tmp_path: Path, kind: str) -> None:
    """In a folder that others can write to, a link of that name would have emptied what it leads to."""
    out, precious = tmp_path / "out", tmp_path / "precious"
    root = Workspace.folder_for(out)
    precious.mkdir()
    (precious / "mine.txt").write_text("mine")
    if kind == "link":
        root.symlink_to(precious)
    elif kind == "file":
        root.write_text("mine")
    else:
        precious.rename(root)
    for begin in (lambda: Workspace.open(out, RUN, overwrite=True), lambda: Workspace.tidy(out)):
        with pytest.raises(InputError, match=r"\.out\.unfinished"):
            begin()
    kept = root if kind == "file" else root / "mine.txt"
    assert kept.read_text() == "mine"


def test_second_holder_is_refused(out: Path) -> None:
    first = Workspace.open(out, RUN)
    (first.pieces / "00000.done").touch()
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(Busy, match=f"process {os.getpid()}"):
            Workspace.open(out, RUN, **flags)
    assert names(first.pieces) == ["00000.done"]
    complete(first)


def test_unfinished_work_needs_a_decision(out: Path) -> None:
    first = Workspace.open(out, RUN)
    (first.pieces / "00000.done").touch()
    first.close(remove=False)
    with pytest.raises(
        InputError, match=r"\(1 layers done\): --resume goes on with it, --overwrite begins anew"
    ):
        Workspace.open(out, RUN)
    again = Workspace.open(out, RUN, resume=True)
    assert names(again.pieces) == ["00000.done"]
    again.close(remove=False)
    anew = Workspace.open(out, RUN, overwrite=True)
    assert names(anew.pieces) == []
    anew.close(remove=True)
    assert names(out.parent) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"rank": 5}}, "options.rank was 4, is 5"),
        ({"options": {"rank": 4, "iters": 1}}, "options.iters was None, is 1"),
        ({"input": {}}, "input.a was '1', is None"),
    ],
)
def test_resume_refuses_another_run(out: Path, change: dict[str, Any], message: str) -> None:
    Workspace.open(out, RUN).close(remove=False)
    with pytest.raises(InputError) as caught:
        Workspace.open(out, RUN | change, resume=True)
    assert message in str(caught.value)
    assert "--overwrite begins anew" in str(caught.value)
    Workspace.open(out, RUN, resume=True).close(remove=True)


def test_half_removed_workspace_is_no_run(out: Path) -> None:
    first = Workspace.open(out, RUN)
    (first.pieces / "00000.done").touch()
    first.close(remove=False)
    (first.root / "run.json").unlink()
    again = Workspace.open(out, RUN)
    assert names(again.pieces) == []
    again.close(remove=True)


def test_tidy_leaves_live_work_alone(out: Path) -> None:
    Workspace.tidy(out)
    assert not out.parent.exists()
    first = Workspace.open(out, RUN)
    with pytest.raises(Busy):
        Workspace.tidy(out)
    first.close(remove=False)
    Workspace.tidy(out)
    assert (first.root / "run.json").exists()


def test_refusals_make_no_folders(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for bad in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(InputError, match="not a folder"):
            Workspace.open(bad, RUN)
    with pytest.raises(InputError, match="mount point"):
        Workspace.open(Path("/proc"), RUN, overwrite=True)
    assert names(tmp_path) == ["file"]
