"""Damaged inputs: one clear line, or damage that stays in the tensors it hit; never a crash, never more."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load

from qlora_engine.safetensors_io import read_header
from tests.faults.child import Fault
from tests.faults.scenes import Scene, Scenes, cases
from tests.faults.test_two_processes import start_and_stop

# scene: corruptions in the default run, in the slow run
CORRUPTIONS = {"init": (5, 110), "merge": (5, 110), "init-calibrated": (0, 30), "finetune": (0, 20)}
KINDS = ("truncate", "header bit", "data bit", "byte", "zeros", "append", "empty", "remove")


def damage(path: Path, kind: str, chance: random.Random) -> tuple[int, int]:
    """Damage a file; the range of bytes that differ (an empty one at the end: its length)."""
    data = bytearray(path.read_bytes())
    size = len(data)
    header = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else size
    at = chance.randrange(size)
    if kind == "truncate":
        data = data[:at]
        found = (at, size)
    elif kind in ("header bit", "data bit", "byte"):
        if kind == "header bit":
            at = chance.randrange(header)
        elif kind == "data bit" and header < size:
            at = chance.randrange(header, size)
        data[at] ^= 1 << chance.randrange(8) if "bit" in kind else chance.randrange(1, 256)
        found = (at, at + 1)
    elif kind == "zeros":
        data[at : at + 512] = bytes(len(data[at : at + 512]))
        found = (at, at + 512)
    elif kind == "append":
        data += chance.randbytes(chance.randrange(1, 100))
        found = (size, size)
    else:
        data = bytearray()
        found = (0, size)
    if kind == "remove":
        path.unlink()
    else:
        path.write_bytes(data)
    return found


def modules_hit(path: Path, begin: int, end: int) -> set[str]:
    """Modules whose tensors lie in a range of bytes of a whole file."""
    entries = read_header(path)[0].values()
    hit = [e.name for e in entries if e.begin < end and begin < e.begin + e.nbytes]
    return {name.split(".weight")[0].split(".lora_")[0].removeprefix("base_model.model.") for name in hit}


def tensors(files: dict[str, bytes]) -> dict[str, bytes]:
    """All tensors of all weight files, by file and name."""
    found = {}
    for file, data in files.items():
        if file.endswith(".safetensors"):
            for name, tensor in load(data).items():
                found[f"{Path(file).parent}/{name}"] = bytes(tensor.contiguous().view(-1).numpy().tobytes())
    return found


def copy_inputs(scene: Scene, folder: Path) -> tuple[Scene, list[Path]]:
    """The scene on copies of its inputs, and the copied files."""
    moved = {path: folder / f"input-{i}{path.suffix}" for i, path in enumerate(scene.inputs)}
    for source, target in moved.items():
        copy: Any = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, target)
    arguments = []
    for word in scene.arguments:
        for source, target in moved.items():
            if isinstance(word, Path) and word.is_relative_to(source):
                word = target / word.relative_to(source)
        arguments.append(word)
    files = [
        path for target in moved.values() for path in [target, *sorted(target.rglob("*"))] if path.is_file()
    ]
    wanted = [
        f for f in files if f.suffix == ".safetensors" or f.name.endswith(("config.json", ".index.json"))
    ]
    wanted += [f for f in files if f.parent == folder]  # texts
    return Scene(scene.program, tuple(arguments), (), scene.wanted, scene.changes, scene.seconds), wanted


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(name, 0, id=f"{name}-few") for name in CORRUPTIONS if CORRUPTIONS[name][0]]
    + [pytest.param(name, 1, marks=pytest.mark.slow, id=f"{name}-many") for name in CORRUPTIONS],
)
def test_damaged_before_the_run(
    name: str, kind: int, scenes: Scenes, tmp_path: Path, chance: random.Random, tell: Callable[[str], None]
) -> None:
    original = scenes[name]
    ends: Counter[str] = Counter()
    for case in range(cases(CORRUPTIONS[name][kind])):
        folder = tmp_path / str(case)
        folder.mkdir()
        scene, files = copy_inputs(original, folder)
        weights = [file for file in files if file.suffix == ".safetensors"]
        victim = chance.choice(weights if chance.random() < 0.7 else files)
        how = chance.choice(KINDS)
        whole = victim.with_name("whole")
        shutil.copy(victim, whole)
        span = damage(victim, how, chance)
        hit = modules_hit(whole, *span) if victim in weights else set()
        whole.unlink()
        work = folder / "work"
        result = scene.run(work)
        where = (case, victim.name, how, span)
        if result.code:
            assert result.error(scene.program), where
            assert not (work / "out").exists() or scene.program == "qlora-finetune", where
            ends["refused"] += 1
        elif scene.contents(work) == scene.wanted:
            ends["no effect"] += 1
        else:
            assert result.err == "", where
            ends["confined"] += 1
            if victim in weights and scene.program != "qlora-finetune" and hit:
                check_confined(tensors(scene.contents(work)), tensors(scene.wanted), hit, where)
        shutil.rmtree(folder)
    tell(f"{ends.total()} corruptions: {dict(ends)}")


def check_confined(
    found: dict[str, bytes], wanted: dict[str, bytes], hit: set[str], where: tuple[Any, ...]
) -> None:
    """Tensors of other modules are what they would have been."""
    assert found.keys() == wanted.keys(), where
    other = {name for name in wanted if found[name] != wanted[name]}
    assert all(any(module in name for module in hit) for name in other), (where, other, hit)


@pytest.mark.parametrize(
    "kind", [pytest.param(1, id="few"), pytest.param(15, marks=pytest.mark.slow, id="many")]
)
@pytest.mark.parametrize("name", ["init", "merge"])
def test_damaged_in_mid_run(
    name: str, kind: int, scenes: Scenes, tmp_path: Path, chance: random.Random, tell: Callable[[str], None]
) -> None:
    """A shard that goes, shrinks or changes while it is read: refused, and afterwards nothing is wrong."""
    original, refused = scenes[name], 0
    for case in range(cases(kind)):
        folder = tmp_path / str(case)
        folder.mkdir()
        scene, files = copy_inputs(original, folder)
        victim = chance.choice([file for file in files if file.suffix == ".safetensors"])
        times = victim.stat()
        whole = victim.with_name("whole")
        shutil.copy(victim, whole)
        work = folder / "work"
        process = start_and_stop(scene, work, chance.uniform(0.1, 0.75))
        damage(victim, chance.choice(("truncate", "data bit", "remove")), chance)
        process.send(signal.SIGCONT)
        result = process.finish()
        assert result.error(scene.program), (case, victim.name)
        assert not (work / "out").exists()
        refused += 1
        shutil.move(whole, victim)
        os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert scene.go_on(work).code == 0, (case, victim.name)
        scene.check_finished(work)
        shutil.rmtree(folder)
    tell(f"{refused} damaged in mid-run")


def test_resume_after_a_kill_and_a_change_is_refused(scenes: Scenes, tmp_path: Path) -> None:
    scene, files = copy_inputs(scenes["init"], tmp_path)
    work = tmp_path / "work"
    assert scene.run(work, fault=Fault(kill_at=scene.changes // 2)).code == -signal.SIGKILL
    shard = next(file for file in files if file.suffix == ".safetensors")
    damage(shard, "data bit", random.Random(0))
    assert "this is not the same run" in scene.run(work, "--resume").error(scene.program)
