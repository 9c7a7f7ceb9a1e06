"""The commands that faults are put into: their inputs, and what of their output no fault may change."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cli.command import files
from tests.faults.child import Fault, Process, Result, run

# Seconds and paths of this very run; all else is the same whatever happened on the way.
VARIABLE = ("report.json", "report.html", "merge_report.json", "training_log.json")


def cases(usual: int) -> int:
    """How many cases of a test to run: FAULTS_CASES, or as many as usual."""
    return int(os.environ.get("FAULTS_CASES", usual))


@dataclass(frozen=True)
class Scene:
    """A command on inputs of its own.

    Attributes:
        program: Its name.
        arguments: Without the flags for going on; the output is ``out`` in the working folder.
        inputs: Folders and files that it reads.
        wanted: What an undisturbed run gives, see ``contents``.
        changes, seconds: Of the undisturbed run.
    """

    program: str
    arguments: tuple[Any, ...]
    inputs: tuple[Path, ...]
    wanted: dict[str, bytes]
    changes: int
    seconds: float

    def start(self, folder: Path, *flags: str, fault: Fault | None = None) -> Process:
        """The command in ``folder``."""
        folder.mkdir(exist_ok=True)
        return Process(self.program, (*self.arguments, *flags), folder, fault or Fault())

    def run(
        self, folder: Path, *flags: str, fault: Fault | None = None, kill_after: float | None = None
    ) -> Result:
        """The command in ``folder``, to its end."""
        return self.start(folder, *flags, fault=fault).finish(kill_after)

    def contents(self, folder: Path) -> dict[str, bytes]:
        """What the output holds, the times of the run left out."""
        return contents(folder / "out")

    def go_on(self, folder: Path) -> Result:
        """Go on with whatever is there, as the messages say to."""
        result = self.run(folder, "--resume")
        if self.program == "qlora-finetune" and result.code == 2:
            assert "nothing to resume" in result.error(self.program)
            result = self.run(folder)
        return result

    def check_finished(self, folder: Path) -> None:
        """The output is that of an undisturbed run, byte for byte, and nothing else is left."""
        assert self.contents(folder) == self.wanted
        assert [path.name for path in folder.iterdir()] == ["out"]


def contents(out: Path) -> dict[str, bytes]:
    """Files by name; of a training run the adapter and its losses, not the checkpoints."""
    found = {name: data for name, data in files(out).items() if Path(name).name not in VARIABLE}
    log = out / "training_log.json"
    if not (out / "checkpoints").exists():
        return found
    found = {name: data for name, data in found.items() if not name.startswith("checkpoints")}
    if log.exists():
        values = json.loads(log.read_text())
        found["losses"] = json.dumps([values["losses"], values["evaluations"]]).encode()
    return found


def make_scene(folder: Path, program: str, arguments: tuple[Any, ...], inputs: tuple[Path, ...]) -> Scene:
    """A scene with what its undisturbed run gives; ``folder`` is made and used up."""
    scene = Scene(program, arguments, inputs, {}, 0, 0.0)
    scene.run(folder)  # the first is slow: imports
    shutil.rmtree(folder)
    result = scene.run(folder)
    assert result.code == 0, result.err
    wanted = scene.contents(folder)
    shutil.rmtree(folder)
    return Scene(program, arguments, inputs, wanted, result.changes, result.seconds)


class Scenes:
    """Scenes by name, made when asked for.

    Args:
        root: Folder for inputs.
        make_checkpoint: See tests/conftest.py.
    """

    def __init__(self, root: Path, make_checkpoint: Callable[..., Path]) -> None:
        self.root, self.make_checkpoint = root, make_checkpoint
        self._made: dict[str, Scene] = {}

    def __getitem__(self, name: str) -> Scene:
        if name not in self._made:
            program, arguments, inputs = getattr(self, name.replace("-", "_"))()
            self._made[name] = make_scene(self.root / f"{name}.undisturbed", program, arguments, inputs)
        return self._made[name]

    def model(self) -> Path:
        """Dense, in several shards."""
        return self.make_checkpoint("llama", shard_size="60KB")

    def text(self) -> Path:
        """Something to calibrate on."""
        path = self.root / "text.txt"
        path.write_text(
            "\n".join(f"The sum of {i} and {i * 7 % 13} is {i + i * 7 % 13}." for i in range(300))
        )
        return path

    def init(self) -> tuple[str, tuple[Any, ...], tuple[Path, ...]]:
        """loftq-init without data."""
        model = self.model()
        return "loftq-init", (model, "out", "--rank", 4, "--max-shard-size", "40KB", "--quiet"), (model,)

    def init_calibrated(self) -> tuple[str, tuple[Any, ...], tuple[Path, ...]]:
        """loftq-init with text and a budget: calibration and sensitivities come first."""
        model, text = self.model(), self.text()
        options = ("--rank", 2, "--bits", 3, "--calibration", text, "--calibration-windows", 2)
        return "loftq-init", (model, "out", *options, "--max-shard-size", "40KB", "--quiet"), (model, text)

    def quantised(self) -> Path:
        """A quantised model with its adapter."""
        folder = self.root / "quantised"
        if not folder.exists():
            result = run("loftq-init", self.model(), folder, "--rank", 4, "--quiet", folder=self.root)
            assert result.code == 0, result.err
        return folder

    def merge(self) -> tuple[str, tuple[Any, ...], tuple[Path, ...]]:
        """qlora-merge of a quantised model with its adapter."""
        base = self.quantised()
        options = ("--max-shard-size", "60KB", "--quiet")
        return "qlora-merge", (base, base / "loftq_init", "out", *options), (base,)

    def merge_requantised(self) -> tuple[str, tuple[Any, ...], tuple[Path, ...]]:
        """qlora-merge into 4 bits again."""
        program, (base, adapter, out, *_), inputs = self.merge()
        options = ("--requantize", "nf4", "--max-shard-size", "40KB", "--quiet")
        return program, (base, adapter, out, *options), inputs

    def finetune(self) -> tuple[str, tuple[Any, ...], tuple[Path, ...]]:
        """qlora-finetune with checkpoints."""
        base, data = self.quantised(), self.root / "data.jsonl"
        rows = [{"prompt": f"{i} plus one is", "completion": f" {i + 1}."} for i in range(40)]
        data.write_text("\n".join(map(json.dumps, rows)))
        options = ("--max-steps", 6, "--batch-size", 2, "--max-length", 48, "--save-every", 1, "--keep", 1)
        arguments = (base, "--data", data, "--output", "out", *options, "--evaluate-every", 3, "--quiet")
        return "qlora-finetune", arguments, (base, data)
