"""Speed, each figure beside its peer and the dense bound in the same run.

    python -m benchmarks.speed --suite dequant,mlp --json speed.json     on a GPU
    python -m benchmarks.speed --suite cpu                               CPU seconds, one thread

Suites: dequant (decode and encode against a copy and bitsandbytes), linear, mlp, qkv (forward and backward of
LoRA layers of Llama-3-8B against dense bf16 layers and PEFT), solver (LoftQ against exact SVDs and PEFT's
algorithm); small (one token), fp8, group (LoftQ for several matrices at once), checkpoint (loftq-init from
disk to disk at the size of Llama-3-8B); cpu (quantise, dequantise and the layer on a CPU: cpu_quant.py and
cpu_linear.py); step (a training step beside PEFT: step.py). A peer that is not installed is named and
left out. ``--tiny`` runs a suite at small sizes and without peers, on a CPU too, where Triton interprets its
kernels: to see that it runs, not to time anything. ``benchmarks.speed_all`` runs all in one go.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import common, cpu_linear, cpu_quant, gpu_suites, layer_suites, step
from benchmarks.bench import Row, device, sized
from quant.spec import QuantSpec
from quant.tensor import quantize

SUITES: dict[str, Callable[[], list[Row]]] = {
    "dequant": gpu_suites.suite_dequant,
    "linear": layer_suites.suite_linear,
    "mlp": layer_suites.suite_mlp,
    "qkv": layer_suites.suite_qkv,
    "solver": gpu_suites.suite_solver,
    "small": gpu_suites.suite_small,
    "fp8": gpu_suites.suite_fp8,
    "group": gpu_suites.suite_group,
    "checkpoint": gpu_suites.suite_checkpoint,
    "recipe": gpu_suites.suite_recipe,
}


def cpu_commands(json_file: Path | None) -> list[tuple[Callable[[list[str]], int], list[str]]]:
    """The CPU's two benchmarks with their arguments; JSON goes beside ``json_file`` under their names."""
    commands: list[tuple[Callable[[list[str]], int], list[str]]] = [
        (cpu_quant.main, ["--formats", "nf4"]),
        (cpu_linear.main, []),
        (cpu_linear.main, ["--shape", "512x512"]),
    ]
    if json_file is not None:
        for (_, arguments), name in zip(commands, ("quant", "linear", "linear-small"), strict=True):
            arguments += ["--json", str(json_file.with_name(f"{json_file.stem}-{name}.json"))]
    return commands


def check() -> None:
    """Refuse to time wrong code: the kernels against the reference, on this device."""
    from quant.backends import reference, triton_kernels

    # Triton's interpreter truncates to bfloat16
    kind = torch.bfloat16 if device() == "cuda" else torch.float32
    weight = torch.randn(257, 320, device=device(), dtype=kind)
    for name in ("nf4", "nf3", "int8", "uint2"):
        fmt = QuantSpec(name).fmt
        want = reference.quantize(weight.cpu(), fmt, 64)
        for a, b in zip(want, triton_kernels.quantize(weight, fmt, 64), strict=True):
            if a is not None and not torch.equal(a, b.cpu()):  # type: ignore[union-attr]
                raise SystemExit(f"{name}: the kernel's codes differ from the reference's; nothing is timed")
        q = quantize(weight, QuantSpec(name))
        if not torch.equal(q.dequantize(backend="triton_kernels"), q.dequantize(backend="reference")):
            raise SystemExit(f"{name}: the kernel's values differ from the reference's; nothing is timed")


def main(arguments: list[str] | None = None) -> int:
    """Run the suites asked for, print a table each, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--suite",
        default=",".join(SUITES),
        help=f"comma-separated, of: {', '.join(SUITES)}; or cpu or step, by itself",
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument(
        "--tiny", action="store_true", help="small sizes, no peers, on a CPU too: does it run"
    )
    options = parser.parse_args(arguments)
    if options.suite == "cpu":
        return max(run(arguments) for run, arguments in cpu_commands(options.json))
    if options.suite == "step":
        json_file = [] if options.json is None else ["--json", str(options.json)]
        return step.main([*json_file, *(["--tiny"] if options.tiny else [])])
    unknown = set(options.suite.split(",")) - set(SUITES)
    if unknown:
        parser.error(f"unknown suite {sorted(unknown)}; known: {', '.join(SUITES)}")
    if not torch.cuda.is_available() and not options.tiny:
        print(
            "needs a CUDA GPU; --suite cpu measures the CPU, --tiny tries the suites there", file=sys.stderr
        )
        return 2
    with sized(options.tiny):
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    check()
    rows: list[Row] = []
    for name in options.suite.split(","):
        found = SUITES[name]()
        rows += found
        print(f"\n## {name}\n\n{common.table(found)}", flush=True)
        if device() == "cuda":
            torch.cuda.empty_cache()
    if options.json:
        common.save(options.json, command=["python", "-m", "benchmarks.speed", *sys.argv[1:]], rows=rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
