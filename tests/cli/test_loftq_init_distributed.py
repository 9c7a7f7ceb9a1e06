"""``torchrun ... loftq-init``: the processes share the layers, the output has the bytes of one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_engine.pipeline import _share
from tests.torchrun import finish

from .command import files, invoke
from .test_finetune_distributed import errors, torchrun

OPTIONS = ("--rank", 4, "--max-shard-size", "60KB")


def without_names(folder: Path) -> dict[str, bytes]:
    """Every file that must not depend on time; the folder's own name, which the adapter's config has, taken
    out."""
    return {name: data.replace(str(folder).encode(), b"OUT") for name, data in files(folder).items()}


class _Layer:
    def __init__(self, index: int, numel: int) -> None:
        self.index, self.entry = index, self
        self.numel = numel


def test_shares_are_disjoint_complete_ordered_and_even() -> None:
    todo: Any = [[_Layer(i + 7 * s, n) for i, n in enumerate((5, 1, 9, 9, 2, 4, 4))] for s in range(3)]
    for size in (1, 2, 3, 20):
        shares = [_share(todo, rank, size) for rank in range(size)]
        loads = [sum(layer.numel for layers in share for layer in layers) for share in shares]
        for shard, layers in enumerate(todo):
            taken = [layer.index for share in shares for layer in share[shard]]
            assert sorted(taken) == [layer.index for layer in layers]
            assert all(sorted(share[shard], key=lambda ly: ly.index) == share[shard] for share in shares)
        assert max(loads) - min(loads) <= 9


def test_two_processes_write_the_bytes_of_one(make_checkpoint: Any, tmp_path: Path) -> None:
    model = make_checkpoint("llama", shard_size="60KB")
    torch.set_num_threads(1)
    alone = invoke(model, tmp_path / "alone", *OPTIONS, "--quiet")
    assert alone.code == 0, alone.err
    status, out, err = finish(torchrun(model, tmp_path / "both", *OPTIONS, "--json", command="loftq_init"))
    assert status == 0, err
    assert without_names(tmp_path / "both") == without_names(tmp_path / "alone")
    assert len(list((tmp_path / "both").glob("model-*.safetensors"))) > 2
    events = [json.loads(line) for line in out.splitlines()]
    names = [event["name"] for event in events if event["event"] == "layer"]
    report = json.loads((tmp_path / "both" / "report.json").read_text())
    assert sorted(names) == sorted(layer["name"] for layer in report["layers"])
    assert [event["event"] for event in events].count("done") == 1
    assert not (tmp_path / ".both.unfinished").exists()


@pytest.mark.slow
def test_four_processes_write_the_bytes_of_one(make_checkpoint: Any, tmp_path: Path) -> None:
    model = make_checkpoint("llama", shard_size="60KB")
    torch.set_num_threads(1)
    assert invoke(model, tmp_path / "alone", *OPTIONS, "--quiet").code == 0
    command = torchrun(model, tmp_path / "all", *OPTIONS, command="loftq_init", processes=4)
    status, _, err = finish(command)
    assert status == 0, err
    assert without_names(tmp_path / "all") == without_names(tmp_path / "alone")


@pytest.mark.slow
def test_a_bad_weight_in_one_process_ends_all_and_leaves_nothing(
    make_checkpoint: Any, tmp_path: Path
) -> None:

    model = tmp_path / "model"
    shutil.copytree(make_checkpoint("llama"), model)
    weights = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name][3, 5] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    status, _, err = finish(torchrun(model, tmp_path / "out", *OPTIONS, command="loftq_init"))
    assert status != 0
    found = errors(err, "loftq-init")
    assert len(found) == 1, err
    assert name in found[0]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_all_and_the_run_goes_on(
    victim: int, make_checkpoint: Any, tmp_path: Path
) -> None:
    model = make_checkpoint("llama", num_hidden_layers=4, hidden_size=256, intermediate_size=512)
    options = (model, *("--rank", 32, "--iters", 30, "--svd", "exact"))
    torch.set_num_threads(1)
    process = torchrun(options[0], tmp_path / "out", *options[1:], command="loftq_init")
    pieces = tmp_path / ".out.unfinished" / "pieces"
    for _ in range(4000):
        if len(list(pieces.glob("*.done"))) >= 4 or process.poll() is not None:
            break
        time.sleep(0.02)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(children[victim]), signal.SIGKILL)
    status, _, err = finish(process)
    assert status != 0
    assert len(errors(err, "loftq-init")) == 1, err
    assert not (tmp_path / "out").exists()
    done = len(list(pieces.glob("*.done")))
    assert done >= 4
    again = torchrun(options[0], tmp_path / "out", *options[1:], "--resume", "--json", command="loftq_init")
    status, out, err = finish(again)
    assert status == 0, err
    kept = [json.loads(line) for line in out.splitlines() if '"layer"' in line]
    assert sum(event.get("kept", False) for event in kept) == done
    assert invoke(options[0], tmp_path / "alone", *options[1:], "--quiet").code == 0
    assert without_names(tmp_path / "out") == without_names(tmp_path / "alone")
