"""Whatever stops a run, nothing that looks whole is left, and going on gives an undisturbed run's bytes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_engine.report import RunReport
from qlora_engine.workspace import Workspace
from tests.cli.command import Result, files, finish, invoke, start

MakeCheckpoint = Callable[..., Path]
# Calls by which a run changes the disk; a kill between any two of them is a state to recover from.
CHANGES = ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir")
ARGUMENTS = ("--rank", 4, "--target-modules", "q_proj,v_proj", "--max-shard-size", "40KB", "--device", "cpu")


@contextlib.contextmanager
def interfere(at: int, act: Callable[[], None], calls: tuple[str, ...] = CHANGES) -> Iterator[list[int]]:
    """Do something before the ``at``-th call that changes the disk; yields the count of calls."""
    count = [0]
    real = {name: getattr(os, name) for name in calls}

    def wrap(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            if count[0] == at:
                count[0] += 1
                act()
            else:
                count[0] += 1
            return real[name](*arguments, **settings)

        return call

    for name in calls:
        setattr(os, name, wrap(name))
    try:
        yield count
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def in_child(kill_at: int, call: Callable[[], int]) -> int:
    """Call in a forked child, which kills itself before a certain change of a file; its exit code.

    A fork needs no imports, so that a hundred kills take seconds; SIGKILL leaves no cleaning up.
    """
    child = os.fork()
    if child == 0:
        code = 70
        try:
            torch.set_num_threads(1)  # the threads of the parent do not exist here
            with interfere(kill_at, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                code = call()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_in_child(source: Path, out: Path, *arguments: Any, kill_at: int = -1) -> int:
    """The command in ``in_child``, from the folder of its output."""

    def call() -> int:
        os.chdir(out.parent)
        return invoke(source, out.name, *ARGUMENTS, *arguments).code

    return in_child(kill_at, call)


@pytest.fixture
def reference(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> tuple[Path, dict[str, bytes]]:
    """The model, and the files of an undisturbed run."""
    source = make_checkpoint("llama", shard_size="60KB")
    (tmp_path / "reference").mkdir()
    assert run_in_child(source, tmp_path / "reference" / "out") == 0
    assert len(list((tmp_path / "reference" / "out").glob("model-*.safetensors"))) > 2
    return source, files(tmp_path / "reference" / "out")


def check_kill(folder: Path, source: Path, wanted: dict[str, bytes], kill_at: int) -> bool:
    """Kill one run before one change, look, resume, compare; False if the run ended before that change."""
    folder.mkdir()
    out = folder / "out"
    status = run_in_child(source, out, kill_at=kill_at)
    if status == -signal.SIGKILL:
        assert not out.exists() or files(out) == wanted
    else:
        assert status == 0
    assert run_in_child(source, out, "--resume") == 0
    assert files(out) == wanted
    assert [path.name for path in folder.iterdir()] == ["out"]
    RunReport.read(out)
    return status != 0


def test_killed_at_a_change_then_resumed(tmp_path: Path, reference: tuple[Path, dict[str, bytes]]) -> None:
    """A tenth of all changes; the slow test below takes every one."""
    source, wanted = reference
    kills = [
        check_kill(tmp_path / str(at), source, wanted, at) for at in range(random.randrange(10), 130, 10)
    ]
    assert sum(kills) >= 8


@pytest.mark.slow
def test_killed_at_every_change_then_resumed(
    tmp_path: Path, reference: tuple[Path, dict[str, bytes]]
) -> None:
    source, wanted = reference
    at = 0
    while check_kill(tmp_path / str(at), source, wanted, at):
        shutil.rmtree(tmp_path / str(at))
        at += 1
    assert at > 90


def check_kill_of_overwrite(folder: Path, source: Path, wanted: dict[str, bytes], kill_at: int) -> bool:
    """As ``check_kill``, with an older output in the place: it or the new one is always to be had."""
    out = folder / "out"
    out.mkdir(parents=True)
    (out / "old.txt").write_text("old")
    status = run_in_child(source, out, "--overwrite", kill_at=kill_at)
    if status == -signal.SIGKILL:
        found = [path for path in (out, Workspace.folder_for(out) / "replaced") if path.exists()]
        assert any(files(path) in ({"old.txt": b"old"}, wanted) for path in found)
        if not out.exists():  # between the two renames: any next run brings it back first
            assert run_in_child(source, out) == 2
            assert files(out) == {"old.txt": b"old"}
    assert run_in_child(source, out, "--overwrite", "--resume") == 0
    assert files(out) == wanted
    assert [path.name for path in folder.iterdir()] == ["out"]
    return status != 0


@pytest.mark.parametrize(
    "part", [pytest.param(slice(None, None, 12)), pytest.param(slice(None), marks=pytest.mark.slow)]
)
def test_killed_while_overwriting(
    tmp_path: Path, reference: tuple[Path, dict[str, bytes]], part: slice
) -> None:
    source, wanted = reference
    (tmp_path / "count" / "out").mkdir(parents=True)
    (tmp_path / "count" / "out" / "old.txt").write_text("old")
    with interfere(-1, lambda: None) as count:
        assert invoke(source, tmp_path / "count" / "out", *ARGUMENTS, "--overwrite").code == 0
    # The last changes put the new output in the old one's place: take all of those.
    moments = sorted({*range(count[0])[part], *range(count[0] - 14, count[0])})
    for at in moments:
        assert check_kill_of_overwrite(tmp_path / f"at-{at}", source, wanted, at)
        shutil.rmtree(tmp_path / f"at-{at}")


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_sigkill_of_the_real_process(tmp_path: Path, make_checkpoint: MakeCheckpoint, kills: int) -> None:
    source = make_checkpoint("llama", shard_size="60KB")
    (tmp_path / "undisturbed").mkdir()
    (tmp_path / "killed").mkdir()
    arguments = (source, "out", "--rank", 4, "--max-shard-size", "40KB", "--json")
    assert finish(start(*arguments, cwd=tmp_path / "undisturbed")).code == 0
    done = 0
    for _ in range(kills):
        process = start(*arguments, "--resume", cwd=tmp_path / "killed")
        _kill_after_layers(process, done + random.randint(1, 3))
        done = len(list((tmp_path / "killed" / ".out.unfinished" / "pieces").glob("*.done")))
        assert done > 0
        assert not (tmp_path / "killed" / "out").exists()
    result = finish(start(*arguments, "--resume", cwd=tmp_path / "killed"))
    assert result.code == 0, result.err
    kept = [json.loads(line)["kept"] for line in result.out.splitlines() if '"event":"layer"' in line]
    assert kept == [True] * done + [False] * (14 - done)
    assert files(tmp_path / "killed") == files(tmp_path / "undisturbed")


def _kill_after_layers(process: subprocess.Popen[str], layers: int) -> None:
    """SIGKILL a little after that many layers were reported (or just before the end, if there are fewer)."""
    assert process.stdout is not None
    seen = 0
    for line in process.stdout:
        seen += '"event":"layer"' in line
        if seen >= min(layers, 12):
            break
    time.sleep(random.random() * 0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def fail_at(at: int, error: OSError) -> Any:
    def act() -> None:
        raise error

    return interfere(at, act, ("fsync", "replace"))  # what can need space


def test_disk_full(
    tmp_path: Path, reference: tuple[Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No space at any moment: one line, status 2; what was finished is kept, or nothing is left."""
    source, wanted = reference
    monkeypatch.chdir(tmp_path)
    for at in range(0, 65, 7):
        with fail_at(at, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) as count:
            result = invoke(source, "out", *ARGUMENTS)
        assert count[0] > at
        message = result.error()
        assert message.startswith("No space left on device")
        kept = Workspace.folder_for(tmp_path / "out").exists()
        assert ("finished layers are kept" in message and "--resume goes on" in message) == kept
        assert not (tmp_path / "out").exists()
        assert invoke(source, "out", *ARGUMENTS, "--resume").code == 0
        assert files(tmp_path / "out") == wanted
        shutil.rmtree(tmp_path / "out")
    assert kept


def test_too_little_space_is_told_before_the_work(
    tmp_path: Path, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    message = invoke(make_checkpoint("llama"), tmp_path / "out", *ARGUMENTS).error()
    assert "has 0.00 GB free, and this run needs about 0.07 GB" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_real_full_disk(
    tmp_path: Path, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], check=False, capture_output=True
    )
    if made.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)  # or it would be told beforehand
        source = make_checkpoint("llama")
        message = invoke(source, disk / "out", *ARGUMENTS).error()
        assert message.startswith("No space left on device")
        assert "--resume goes on" in message
        assert not (disk / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        assert invoke(source, disk / "out", *ARGUMENTS, "--resume").code == 0
        RunReport.read(disk / "out")
    finally:
        subprocess.run(["umount", disk], check=True)


def stop_after_first_layer(source: Path, out: Path) -> subprocess.Popen[str]:
    """A run that is held still with its first layers done."""
    process = start(source, out, *ARGUMENTS, "--json")
    assert process.stdout is not None
    for line in process.stdout:
        if '"event":"layer"' in line:
            break
    process.send_signal(signal.SIGSTOP)
    return process


def test_second_process_is_refused_and_sigint_is_no_loss(
    tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    source = make_checkpoint("llama")
    out = tmp_path / "out"
    first = stop_after_first_layer(source, out)
    try:
        for flags in ([], ["--resume"], ["--overwrite"]):
            message = invoke(source, out, *ARGUMENTS, *flags).error()
            assert message == f"another process (process {first.pid}) is writing {out}; wait until it ends"
        first.send_signal(signal.SIGINT)
    finally:
        first.send_signal(signal.SIGCONT)
    result = finish(first)
    if result.code:  # it may have been done with the last layer already
        assert result.code == 130
        assert "loftq-init: interrupted; finished layers are kept in" in result.err
        assert invoke(source, out, *ARGUMENTS, "--resume").code == 0
    RunReport.read(out)


@pytest.fixture
def unfinished(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> tuple[Path, Path]:
    """A model of its own and an output whose run was cut off."""
    source = Path(shutil.copytree(make_checkpoint("llama", shard_size="60KB"), tmp_path / "model"))
    assert run_in_child(source, tmp_path / "out", kill_at=40) == -signal.SIGKILL
    assert Workspace.folder_for(tmp_path / "out").exists()
    return source, tmp_path / "out"


def run_again(source: Path, out: Path, *arguments: Any) -> Result:
    return invoke(source, out, *ARGUMENTS, *arguments)


def test_unfinished_work_is_not_lost_by_accident(unfinished: tuple[Path, Path]) -> None:
    message = run_again(*unfinished).error()
    assert "an unfinished run for" in message
    assert "layers done): --resume goes on with it, --overwrite begins anew" in message
    assert run_again(*unfinished, "--overwrite", "--rank", "3").code == 0
    assert {layer.rank for layer in RunReport.read(unfinished[1]).layers} == {3}


def test_resume_refuses_other_options(unfinished: tuple[Path, Path]) -> None:
    message = run_again(*unfinished, "--resume", "--rank", 5).error()
    assert "this is not the same run: options.rank was 4, is 5 (--overwrite begins anew)" in message
    assert run_again(*unfinished, "--resume").code == 0


def test_resume_refuses_another_input(unfinished: tuple[Path, Path]) -> None:
    source, out = unfinished
    shard = sorted(source.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    message = run_again(source, out, "--resume").error()
    assert f"this is not the same run: input.{shard.name} was" in message


def test_a_shard_that_vanishes_stops_the_run_and_no_more(
    unfinished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_engine import pipeline

    source, out = unfinished
    solve, solved = pipeline.solve_layer, []
    shards = sorted(source.glob("*.safetensors"))

    def solve_and_remove(*arguments: Any) -> Any:
        solved.append(solve(*arguments))
        for shard in shards:
            if shard.exists():
                shard.rename(shard.with_suffix(".away"))
        return solved[-1]

    monkeypatch.setattr(pipeline, "solve_layer", solve_and_remove)
    message = run_again(source, out, "--resume").error()
    assert f"cannot read {source}" in message
    assert "--resume goes on" in message
    monkeypatch.undo()
    for shard in shards:
        if not shard.exists():
            shard.with_suffix(".away").rename(shard)
    assert run_again(source, out, "--resume").code == 0


def test_resume_of_a_finished_run_changes_nothing(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    source, out = make_checkpoint("llama"), tmp_path / "out"
    assert run_again(source, out, "--resume").code == 0  # nothing to resume: a new run
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = run_again(source, out, "--resume")
    assert again.code == 0
    assert "geometric mean" in again.out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times
    assert "exists and is not empty" in run_again(source, out, "--resume", "--rank", 3).error()
    assert "exists and is not empty" in run_again(source, out).error()
    assert run_again(source, out, "--overwrite").code == 0


def test_input_that_changes_meanwhile_is_refused(
    tmp_path: Path, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_engine import pipeline

    source = Path(shutil.copytree(make_checkpoint("llama"), tmp_path / "model"))
    solve = pipeline.solve_layer

    def solve_and_touch(*arguments: Any) -> Any:
        os.utime(source / "model.safetensors", ns=(1, 1))
        return solve(*arguments)

    monkeypatch.setattr(pipeline, "solve_layer", solve_and_touch)
    assert "was changed while it was read" in run_again(source, tmp_path / "out").error()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
