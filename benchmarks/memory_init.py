"""Peak memory of ``loftq-init`` on a synthetic checkpoint many times as large as its largest layer.

    python benchmarks/memory_init.py                      # a Llama of 1.5 GB in bfloat16, 4 shards
    python benchmarks/memory_init.py --hidden 2048 --intermediate 8192 --layers 12

The command runs as a process of its own. Beside it, the same command on a model of 1 MB (what Python, torch
and transformers take), and plain ``from_pretrained`` of the same checkpoint (the least that a tool which
loads the model first would take).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, save, table
from qlora_engine.checkpoint import shard_names, split_shards, write_index
from qlora_engine.safetensors_io import DenseTensor, write_file

# Weights may be mapped from the file until they are used, so use them.
LOAD = (
    "import sys; from transformers import AutoModelForCausalLM as M; model = M.from_pretrained(sys.argv[1]); "
    "print(sum(float(p.detach().max()) for p in model.parameters()))"
)
MARK = "PEAK="
TINY = {"hidden": 256, "intermediate": 256, "layers": 1, "vocabulary": 500}
# ru_maxrss of a child is at least its parent's size at the fork, so a small process starts the measured one.
WRAPPER = (
    "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); "
    f"print('{MARK}' + str(1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)); sys.exit(code)"
)


def make_checkpoint(folder: Path, arguments: argparse.Namespace) -> int:
    """Write a Llama with random bfloat16 weights, one tensor in memory at a time; bytes of its weights."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=max(1, arguments.hidden // 256),
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    names, generator = list(shapes), torch.Generator().manual_seed(0)
    runs = split_shards([2 * shapes[name].numel() for name in names], arguments.shard_size)
    weight_map: dict[str, str] = {}
    for run, file_name in zip(runs, shard_names(len(runs)), strict=True):
        members = [names[position] for position in run]
        write_file(folder / file_name, [_random(n, shapes[n], generator) for n in members], {"format": "pt"})
        weight_map |= dict.fromkeys(members, file_name)
    total = sum(2 * shape.numel() for shape in shapes.values())
    if len(runs) > 1:
        write_index(folder, weight_map, total)
    return total


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> DenseTensor:
    return DenseTensor(name, torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator))


def peak(command: list[str]) -> tuple[int, float]:
    """Largest resident memory (bytes) and wall seconds of a command run as a process of its own."""
    began = time.perf_counter()
    environment_ = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", WRAPPER, *command],
        env=environment_,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise SystemExit(f"{command[:4]} ended with {result.returncode}:\n{result.stderr[-2000:]}")
    line = next(line for line in result.stdout.splitlines() if line.startswith(MARK))
    return int(line.removeprefix(MARK)), time.perf_counter() - began


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the checkpoint, run the three processes, return the figures."""
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        model, out = Path(scratch) / "model", Path(scratch) / "out"
        total = make_checkpoint(model, arguments)
        tiny = Path(scratch) / "tiny"
        make_checkpoint(tiny, argparse.Namespace(**{**vars(arguments), **TINY}))
        program = [sys.executable, "-m", "qlora_engine.cli.loftq_init"]
        settings = ["--device", "cpu", "--rank", str(arguments.rank), "--iters", str(arguments.iters)]
        base, _ = peak([*program, str(tiny), str(Path(scratch) / "tiny-out"), *settings, "--quiet"])
        command = [*program, str(model), str(out), *settings]
        used, seconds = peak([*command, "--quiet"])
        report = json.loads((out / "report.json").read_text())
        planned = subprocess.run(
            [*command, "--dry-run", "--json"],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        loaded, load_seconds = peak([sys.executable, "-c", LOAD, str(model)])
    largest = max(layer["shape"][0] * layer["shape"][1] for layer in report["layers"])
    return {
        "checkpoint_bytes": total,
        "largest_layer_bytes": 2 * largest,
        "tiny_model_peak": base,
        "loftq_init_peak": used,
        "loftq_init_above_tiny": used - base,
        "above_tiny_in_float32_layers": (used - base) / (4 * largest),
        "expected_by_dry_run": json.loads(planned.stdout)["expected_memory"],
        "loftq_init_seconds": seconds,
        "from_pretrained_peak": loaded,
        "from_pretrained_seconds": load_seconds,
        "error_plain": report["totals"]["error_plain_mean"],
        "error": report["totals"]["error_mean"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--layers", type=int, default=15)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--shard-size", type=int, default=400_000_000)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--iters", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="where to put the checkpoint (default: /tmp)")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    arguments = parser.parse_args()
    found = measure(arguments)
    rows = [{"what": name, "figure": value} for name, value in found.items()]
    shown = [
        {"what": name, "figure": f"{value / 1e6:,.0f} MB" if isinstance(value, int) else f"{value:.4g}"}
        for name, value in found.items()
    ]
    print(table(shown))
    if arguments.json:
        save(arguments.json, command=sys.argv, rows=rows)


if __name__ == "__main__":
    main()
