"""A frozen NF4 Linear on a CPU: CPU seconds against bitsandbytes' layer and the dense one, in one run.

    python -m benchmarks.cpu_linear                       4096 x 4096, one thread

Forward at 1, 16 and 512 tokens in float32 and bfloat16, and forward and backward (gradient of the input) at
512 tokens in bfloat16, once more in a process whose oneDNN is held to AVX2: a CPU without native bfloat16, on
which torch's own bfloat16 products are naive loops. Outputs are compared with the dequantised weight's before
anything is timed. Calls take turns; medians of CPU time are reported.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import ROOT, save, table, time_each
from quant import QuantSpec, quantize
from quant.linear import QuantLinear

BNB = importlib.util.find_spec("bitsandbytes") is not None
SPEC = QuantSpec("nf4", 64)
OLD_CPU = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the output's norm; bf16 has 8 bits


def layers(shape: tuple[int, int], dtype: torch.dtype) -> dict[str, nn.Module]:
    """Our layer, the dense one with the same values and, where installed, bitsandbytes'."""
    rows, columns = shape
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / columns**0.5
    ours = QuantLinear.from_quantized(quantize(weight, SPEC))
    dense = nn.Linear(columns, rows, bias=False)
    dense.weight.data = ours.dequantize(dtype)
    found: dict[str, nn.Module] = {"ours": ours, "dense": dense.requires_grad_(False)}
    if BNB:
        import bitsandbytes as bnb

        theirs = bnb.nn.Linear4bit(
            columns, rows, bias=False, compute_dtype=dtype, compress_statistics=False, quant_type="nf4"
        )
        theirs.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, compress_statistics=False, quant_type="nf4", blocksize=64
        )
        found["bnb"] = theirs.to("cpu")
    return found


def step(layer: nn.Module, x: Tensor, grad: Tensor | None) -> Callable[[], Tensor]:
    """Forward, or with ``grad`` forward and backward to the input."""
    if grad is None:

        def forward() -> Tensor:
            with torch.no_grad():
                y: Tensor = layer(x)
            return y

        return forward

    def both() -> Tensor:
        leaf = x.detach().requires_grad_(True)
        return torch.autograd.grad(layer(leaf), leaf, grad)[0]

    return both


def check(found: dict[str, nn.Module], x: Tensor, grad: Tensor | None) -> None:
    """Our result equals the dequantised weight's in float32, or SystemExit."""
    weight = found["ours"].dequantize(torch.float32)  # type: ignore[operator]
    want = x.float() @ weight.T if grad is None else grad.float() @ weight
    apart = float((step(found["ours"], x, grad)().float() - want).norm() / want.norm())
    if not apart < TOLERANCE[x.dtype]:
        raise SystemExit(f"{tuple(x.shape)} {x.dtype}: {apart:.1e} from the dense product; nothing is timed")


def case(
    found: dict[str, nn.Module], dtype: torch.dtype, tokens: int, *, backward: bool, repeats: int
) -> dict[str, Any]:
    """One line: milliseconds of CPU time, and how many times bitsandbytes' and the dense layer's it is."""
    generator = torch.Generator().manual_seed(1)
    rows, columns = found["ours"].shape  # type: ignore[misc]
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    grad = torch.randn(tokens, rows, generator=generator).to(dtype) if backward else None
    check(found, x, grad)
    calls = {name: step(layer, x, grad) for name, layer in found.items()}
    times = time_each(calls, warmup=1 if repeats > 1 else 0, repeats=repeats, clock=time.process_time)
    ms = {name: 1e3 * timing.median for name, timing in times.items()}
    line: dict[str, Any] = {
        "what": "forward, backward" if backward else "forward",
        "dtype": str(dtype).removeprefix("torch."),
        "native bf16": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        "tokens": tokens,
        "ours ms": ms["ours"],
    }
    if "dense" in ms:
        line |= {"dense ms": ms["dense"], "x dense": ms["ours"] / ms["dense"]}
    return line | ({"bnb ms": ms["bnb"], "x bnb": ms["bnb"] / ms["ours"]} if "bnb" in ms else {})


def on_this_cpu(shape: tuple[int, int], repeats: int) -> Iterator[dict[str, Any]]:
    """Forwards in both dtypes, and the bfloat16 training step."""
    for dtype in (torch.float32, torch.bfloat16):
        found = layers(shape, dtype)
        for tokens in (1, 16, 512):
            yield case(found, dtype, tokens, backward=False, repeats=repeats if tokens < 512 else 3)
    yield case(found, torch.bfloat16, 512, backward=True, repeats=3)


def on_an_old_cpu(shape: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """The training step in a process whose oneDNN knows no bfloat16."""
    size = "x".join(map(str, shape))
    command = [sys.executable, "-m", "benchmarks.cpu_linear", "--shape", size, "--step-only"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | OLD_CPU, stdout=subprocess.PIPE, text=True, check=True
    )
    yield json.loads(done.stdout.splitlines()[-1])


def measure(shape: tuple[int, int], repeats: int) -> list[dict[str, Any]]:
    """Every line, told on stderr as it comes."""
    rows = []
    for line in itertools.chain(on_this_cpu(shape, repeats), on_an_old_cpu(shape)):
        rows.append(line)
        print(line, file=sys.stderr, flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="4096x4096", metavar="OUTxIN")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--step-only", action="store_true", help="the bfloat16 training step, once, as JSON")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    rows, columns = map(int, arguments.shape.split("x"))
    if not BNB:
        print("bitsandbytes is not installed: its columns stay empty", file=sys.stderr)
    if arguments.step_only:
        found = layers((rows, columns), torch.bfloat16)
        del found["dense"]  # the same naive product as bitsandbytes', minutes of it
        print(json.dumps(case(found, torch.bfloat16, 512, backward=True, repeats=1)))
        return 0
    lines = measure((rows, columns), arguments.repeats)
    print(table(lines))
    if arguments.json:
        save(
            arguments.json,
            command=["benchmarks.cpu_linear", *(sys.argv[1:] if argv is None else argv)],
            rows=lines,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
