"""Several GPUs of one machine: loftq-init and qlora-finetune under torchrun, beside one GPU, as commands.

    python -m benchmarks.several_gpus --json several.json      # everything, on as many GPUs as are visible
    python -m benchmarks.several_gpus --tiny                   # small, two processes on a CPU

init: a checkpoint of Llama-3-8B's shape, random weights, disk to disk, and whether the bytes are those of one
process. finetune: 4 bits of it, 2048 tokens a sequence, one sequence a GPU, with copies (and CUDA graphs) and
with shards (FSDP2), beside one GPU with as many sequences a step, whose losses must be the same, and one GPU
with one. large: Llama-3-70B's shape, sharded, everything recomputed. Tokens a second are of the steps behind
the first four; the peak is what torch allocated on each GPU, host what a process had of its own. With one GPU
visible, its rows alone are measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench
from benchmarks.common import ROOT, save, table
from benchmarks.finetune import byte_tokenizer
from benchmarks.gpu_suites import synthetic_checkpoint
from benchmarks.real_models import python_topics

Row = dict[str, Any]
SUITES = ("init", "finetune", "large")
WARM = 4  # steps: kernels are compiled, graphs captured
LARGE = replace(bench.SIZES, hidden=8192, width=28672, layers=80)
TINY = replace(bench.TINY, vocabulary=512)
APART = 0.02  # nats: bfloat16, and sums in another order


@dataclass
class Run:
    """A command that has ended: when each line came out, and the most memory a process of it had."""

    seconds: float
    lines: list[tuple[float, str]]
    host_bytes: int


def run(module: str, *words: Any, processes: int = 1) -> Run:
    """A command of the project, in one process or under torchrun; its complaints if it fails."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", f"qlora_engine.cli.{module}", *map(str, words)]
    print(" ".join(command[1:]), file=sys.stderr, flush=True)
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryFile("w+") as complaints:
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        most = [0]
        watch = threading.Thread(target=_watch, args=(process, most), daemon=True)
        watch.start()
        assert process.stdout is not None
        lines = [(time.perf_counter() - began, line) for line in process.stdout]
        status = process.wait()
        seconds = time.perf_counter() - began
        watch.join()
        if status:
            complaints.seek(0)
            raise RuntimeError(f"{module} ended with {status}: {complaints.read()[-3000:]}")
    return Run(seconds, lines, most[0])


def _watch(process: subprocess.Popen[str], most: list[int]) -> None:
    """Look twice a second at what a process and those below it have in memory that no file backs."""
    while process.poll() is None:
        facts: dict[int, dict[str, str]] = {}
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                lines = [line.split(":", 1) for line in status.read_text().splitlines() if ":" in line]
            except OSError:  # it has ended
                continue
            facts[int(status.parent.name)] = {name: value.strip() for name, value in lines}
        ours = {process.pid}
        while more := {pid for pid, fact in facts.items() if int(fact["PPid"]) in ours} - ours:
            ours |= more
        sizes = [int(facts[pid].get("RssAnon", "0 kB").split()[0]) << 10 for pid in ours if pid in facts]
        most[0] = max(most[0], *sizes, 0)
        time.sleep(0.5)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of weights in a folder, and of what tells of them."""
    paths = [*sorted(folder.rglob("*.safetensors")), folder / "config.json"]
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(_sha256, paths)
        return dict(zip([str(path.relative_to(folder)) for path in paths], found, strict=True))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def suite_init(scratch: Path, sizes: bench.Sizes, counts: list[int], rank: int) -> list[Row]:
    """Disk to disk with one GPU and with several; the first output stays for the next suite."""
    rows: list[Row] = []
    alone: dict[str, str] = {}
    for count in counts:
        out = scratch / f"out{count}"
        found = run("loftq_init", scratch / "model", out, "--rank", rank, "--quiet", processes=count)
        report = json.loads((out / "report.json").read_text())
        solving = sum(layer["seconds"] for layer in report["layers"])
        ours = digests(out)
        alone = alone or ours
        rows.append(
            {
                "suite": "init",
                "GPUs": count,
                "GB in": report["bytes_in"] / 1e9,
                "GB out": report["bytes_out"] / 1e9,
                "command s": found.seconds,
                "disk to disk s": report["seconds"],
                "solving s, each": solving / count,
                "share not solving": 1 - solving / count / report["seconds"],
                "files": len(ours),
                "files other than one GPU's": sum(alone[name] != digest for name, digest in ours.items()),
                "host GB": found.host_bytes / 1e9,
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
        if count > 1:
            for path in out.rglob("*.safetensors"):
                path.unlink()
    return rows


def train(model: Path, data: Path, output: Path, steps: int, length: int, count: int, *options: Any) -> Row:
    """One run of qlora-finetune: losses, tokens a second once it is warm, peak on each GPU."""
    common = ("--max-steps", steps, "--max-length", length, "--packing", "on", "--json", "--train-on", "all")
    held = ("--validation-fraction", 0, "--scheduler", "constant", "--warmup", 0)
    words = (model, "--data", data, "--output", output, *common, *held, *options)
    found = run("finetune", *words, processes=count)
    events = [(at, json.loads(line)) for at, line in found.lines]
    steps_at = [(at, event) for at, event in events if event["kind"] == "log" and "loss" in event]
    outcome = events[-1][1]
    tokens = outcome["tokens_per_second"] * outcome["seconds"] / steps
    warm = [at for at, _ in steps_at][min(WARM, steps - 2) :]
    return {
        "GPUs": count,
        "tok/s": tokens * (len(warm) - 1) / (warm[-1] - warm[0]),
        "peak MiB": ", ".join(str(round(peak / 2**20)) for peak in outcome["peak_bytes"]),
        "recomputed": events[0][1]["recomputed"],
        "host GB": found.host_bytes / 1e9,
        "until step 1 s": steps_at[0][0],
        "command s": found.seconds,
        "losses": [event["loss"] for _, event in steps_at],
        "graphs": any("were replayed" in note for note in outcome["notes"]),
    }


def suite_finetune(scratch: Path, counts: list[int], steps: int, length: int) -> list[Row]:
    """Copies and shards beside one GPU, with the losses of the same sequences a step."""
    model, data, rows = scratch / "out1", scratch / "text.txt", list[Row]()
    several = max(counts)
    cases: list[tuple[str, int, tuple[Any, ...]]] = [
        ("one GPU", 1, ("--batch-size", 1)),
        ("one GPU, no graphs", 1, ("--batch-size", 1, "--cuda-graphs", "off")),
    ]
    if several > 1:
        cases += [
            (f"one GPU, {several} sequences", 1, ("--batch-size", several)),
            *((f"copies on {n}", n, ("--batch-size", 1)) for n in counts if n > 1),
            (f"copies on {several}, no graphs", several, ("--batch-size", 1, "--cuda-graphs", "off")),
            *((f"shards on {n}", n, ("--batch-size", 1, "--shard")) for n in counts if n > 1),
        ]
    for number, (what, count, options) in enumerate(cases):
        output = scratch / f"adapter{number}"
        found = train(model, data, output, steps, length, count, "--recompute", "none", *options)
        sequences = count * int(options[1])
        rows.append({"suite": "finetune", "what": what, "sequences": sequences, **found})
        print(rows[-1], file=sys.stderr, flush=True)
    for row in rows:
        like = next((r for r in rows if r["GPUs"] == 1 and r["sequences"] == row["sequences"]), rows[0])
        if like["sequences"] != row["sequences"]:
            continue
        row["losses apart"] = max(abs(a - b) for a, b in zip(row["losses"], like["losses"], strict=True))
        if row["losses apart"] > APART:
            raise SystemExit(f"the losses are not one GPU's: {row} and {like}")
        row["tok/s x one GPU"] = row["tok/s"] / rows[0]["tok/s"]
    return [_short(row) for row in rows]


def _short(row: Row) -> Row:
    losses = row.pop("losses")
    return row | {"first loss": losses[0], "last loss": losses[-1]}


def suite_large(scratch: Path, sizes: bench.Sizes, count: int, steps: int, length: int) -> list[Row]:
    """A model that one small GPU cannot hold, sharded; PEFT reads the adapter again."""
    source, one, model = scratch / "block", scratch / "block4", scratch / "large"
    synthetic_checkpoint(source, replace(sizes, layers=1))
    byte_tokenizer(source, 512)
    _free()
    run("loftq_init", source, one, "--method", "qlora", "--rank", 16, "--quiet")
    began = time.perf_counter()
    size = repeated(one, model, sizes.layers)
    made = time.perf_counter() - began
    rows: list[Row] = []
    for offload in ("none", "embedding,activations"):
        output = scratch / f"large-{len(rows)}"
        options = ("--batch-size", 1, "--recompute", "full", "--offload", offload, "--rank", 16)
        shard = ("--shard",) if count > 1 else ()
        found = train(model, scratch / "text.txt", output, steps, length, count, *options, *shard)
        what = f"{sizes.layers} layers of {sizes.hidden}, {count} GPUs, offload {offload}"
        rows.append(_short({"suite": "large", "what": what, "GB": size / 1e9, "written s": made, **found}))
        print(rows[-1], file=sys.stderr, flush=True)
        rows[-1] |= {"adapter MB": adapter_in_peft(output, sizes.layers) / 1e6}
    return rows


def repeated(one: Path, folder: Path, layers: int) -> int:
    """A checkpoint of so many layers, all of them the only one of ``one``; bytes written."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder.mkdir()
    config = json.loads((one / "config.json").read_text()) | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    for path in one.glob("token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    layer, rest = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for path in one.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                (layer if ".layers.0." in name else rest)[name] = file.get_tensor(name)
    shards = [
        {name.replace(".layers.0.", f".layers.{i}."): t for name, t in layer.items()} for i in range(layers)
    ]
    shards.append(rest)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    with ThreadPoolExecutor(8) as pool:
        pool.map(
            lambda pair: save_file(pair[0], folder / pair[1], metadata={"format": "pt"}),
            zip(shards, names, strict=True),
        )
    size = sum(t.nbytes for shard in shards for t in shard.values())
    weight_map = {key: name for shard, name in zip(shards, names, strict=True) for key in shard}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def adapter_in_peft(folder: Path, layers: int) -> int:
    """Bytes of the adapter as PEFT reads it; all layers must be there, whole and trained."""
    from peft import LoraConfig
    from peft.utils import load_peft_weights

    LoraConfig.from_pretrained(str(folder))
    weights = load_peft_weights(str(folder), device="cpu")
    assert len(weights) == 2 * 7 * layers, len(weights)
    assert all(bool(tensor.any()) for tensor in weights.values())
    return sum(tensor.nbytes for tensor in weights.values())


def _free() -> None:
    """What this process drew on the first GPU is not the commands' business."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> int:
    """Measure what is asked for, print tables, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES, metavar="SUITE")
    parser.add_argument("--tiny", action="store_true", help="small, two processes on a CPU")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--scratch", type=Path, help="where the checkpoints go (60 GB; default: /tmp)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    visible = torch.cuda.device_count()
    if not arguments.tiny and not visible:
        print("needs CUDA GPUs; --tiny tries the code on a CPU", file=sys.stderr)
        return 2
    counts = [1, 2] if arguments.tiny else [n for n in (1, 2, 4, 8) if n <= visible]
    steps = 3 if arguments.tiny else arguments.steps
    length = 64 if arguments.tiny else 2048
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="several-", dir=arguments.scratch) as folder:
        scratch = Path(folder)
        (scratch / "text.txt").write_text(python_topics())
        if "large" not in arguments.suites or len(arguments.suites) > 1:
            synthetic_checkpoint(scratch / "model", TINY if arguments.tiny else bench.SIZES)
            byte_tokenizer(scratch / "model", 512)
            _free()
            rank = 4 if arguments.tiny else bench.SIZES.solver_rank
            rows += suite_init(scratch, bench.SIZES, counts if "init" in arguments.suites else [1], rank)
        if "finetune" in arguments.suites:
            rows += suite_finetune(scratch, counts, steps, length)
        if "large" in arguments.suites:
            sizes = replace(TINY, layers=3) if arguments.tiny else LARGE
            rows += suite_large(scratch, sizes, max(counts), min(steps, 8), length)
    for suite in arguments.suites:
        print(table([row for row in rows if row["suite"] == suite]))
    if arguments.json:
        command = ["python", "-m", "benchmarks.several_gpus", *(argv or sys.argv[1:])]
        save(arguments.json, command=command, rows=rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
