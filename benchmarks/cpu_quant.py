"""Quantise and dequantise on a CPU: CPU seconds against bitsandbytes and a memcpy, in one run.

    python -m benchmarks.cpu_quant                        NF4 and the other formats, 4096 x 4096, one thread
    python -m benchmarks.cpu_quant --formats nf4 --rules signed-mse      the scale search too

Results are compared with the reference before anything is timed; a difference is an error. ``x memcpy`` and
``x bnb`` are times over that of a copy of the float32 weight, and bitsandbytes' time over ours. Calls take
turns, so that they see the same noise; medians are reported. Without bitsandbytes its columns stay empty.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import save, table, time_each
from quant import QuantSpec, formats, quantize
from quant.backends import compiled

BNB = importlib.util.find_spec("bitsandbytes") is not None
FORMATS = ("nf4", "fp4", "int4", "uint4", "nf3", "nf2", "int8")
ROWS = 64  # of a tile, as the forward of a quantised Linear takes it


def measure(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each call."""
    timings = time_each(calls, warmup=1, repeats=repeats, clock=time.process_time)
    return {name: timing.median for name, timing in timings.items()}


def check(weight: Tensor, spec: QuantSpec) -> None:
    """Codes, scales and values equal the reference's, or SystemExit."""
    part = weight[: max(1, (1 << 20) // weight.shape[1])]
    ours = quantize(part, spec)
    truth = quantize(part, spec, backend="reference")
    for name, tensor in truth.state_dict().items():
        if not torch.equal(tensor, ours.state_dict()[name]):
            raise SystemExit(f"{spec}: {name} differ from the reference")
    for dtype in (torch.float32, torch.bfloat16):
        if not torch.equal(ours.dequantize(dtype), truth.dequantize(dtype, backend="reference")):
            raise SystemExit(f"{spec}: values differ from the reference")


def bnb_calls(weight: Tensor, spec: QuantSpec, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """bitsandbytes' functions on the same weight, where it has the format."""
    if not BNB or spec.fmt.bnb_type is None:
        return {}
    from bitsandbytes import functional

    arguments = {"blocksize": spec.block_size, "quant_type": spec.fmt.bnb_type}
    arguments["compress_statistics"] = spec.double_quant
    codes, state = functional.quantize_4bit(weight, **arguments)
    state.dtype = dtype
    return {
        "quantize": lambda: functional.quantize_4bit(weight, **arguments),
        "dequantize": lambda: functional.dequantize_4bit(codes, state),
    }


def cases(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    rows, columns = arguments.shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    workspace = torch.empty_like(weight)
    specs = [QuantSpec(name, arguments.block_size) for name in arguments.formats]
    if "nf4" in arguments.formats:
        specs.insert(1, QuantSpec("nf4", arguments.block_size, True))
    for spec in specs:
        label = spec.format + ("+dq" if spec.double_quant else "")
        check(weight, spec)
        for dtype in (torch.float32, torch.bfloat16):
            source = weight.to(dtype)
            peer = bnb_calls(source, spec, dtype)
            times = measure(
                {
                    "memcpy": lambda: workspace.copy_(weight),
                    "ours": lambda: quantize(source, spec),  # noqa: B023
                    **({"bnb": peer["quantize"]} if peer else {}),
                },
                arguments.repeats,
            )
            yield row(label, "quantise", dtype, times)
            if spec.format == "nf4" and not spec.double_quant and dtype == torch.float32:
                yield from _compiled(weight, spec, workspace, peer, arguments.repeats)
        q = quantize(weight, spec)
        for dtype in (torch.float32, torch.bfloat16):
            target = torch.empty(rows, columns, dtype=dtype)
            tile = torch.empty(ROWS, columns, dtype=dtype)
            peer = bnb_calls(weight, spec, dtype)

            def by_rows(q: Any = q, tile: Tensor = tile) -> None:
                for start in range(0, rows - rows % ROWS, ROWS):
                    q.dequantize_rows(start, start + ROWS, out=tile)

            for what, call in (
                ("dequantise into a workspace", lambda q=q, target=target: q.dequantize(out=target)),
                (f"dequantise by {ROWS} rows", by_rows),
                ("dequantise, fresh tensor", lambda q=q, dtype=dtype: q.dequantize(dtype)),
            ):
                times = measure(
                    {
                        "memcpy": lambda: workspace.copy_(weight),
                        "ours": call,
                        **({"bnb": peer["dequantize"]} if peer else {}),
                    },
                    arguments.repeats,
                )
                yield row(label, what, dtype, times)
        for rule in arguments.rules:
            times = measure(
                {
                    "memcpy": lambda: workspace.copy_(weight),
                    "ours": lambda: quantize(weight, spec, scales=rule),  # noqa: B023
                },
                max(1, arguments.repeats // 3),
            )
            error = float((quantize(weight, spec, scales=rule).dequantize() - weight).norm() / weight.norm())
            yield row(label, f"quantise, {rule}", torch.float32, times) | {"relative error": error}


def _compiled(
    weight: Tensor,
    spec: QuantSpec,
    workspace: Tensor,
    peer: dict[str, Callable[[], object]],
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """The loop that torch.compile makes, where there is a C++ compiler; compiling is not counted."""
    reason = compiled.unavailable(weight.device, spec.fmt, spec.block_size)
    if reason is not None:
        print(f"compiled: {reason}: its row is left out", file=sys.stderr)
        return
    if not torch.equal(quantize(weight, spec, backend="compiled").codes, quantize(weight, spec).codes):
        raise SystemExit(f"{spec}: compiled codes differ from the look-up's")
    times = measure(
        {
            "memcpy": lambda: workspace.copy_(weight),
            "ours": lambda: quantize(weight, spec, backend="compiled"),
            **({"bnb": peer["quantize"]} if peer else {}),
        },
        repeats,
    )
    yield row(spec.format, "quantise, compiled", torch.float32, times)


def row(label: str, what: str, dtype: torch.dtype, times: dict[str, float]) -> dict[str, Any]:
    """One line of the report, from CPU seconds."""
    line: dict[str, Any] = {
        "format": label,
        "what": what,
        "dtype": str(dtype).removeprefix("torch."),
        "ours ms": times["ours"] * 1e3,
        "x memcpy": times["ours"] / times["memcpy"],
    }
    if "bnb" in times:
        line |= {"bnb ms": times["bnb"] * 1e3, "x bnb": times["bnb"] / times["ours"]}
    return line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=_shape, default=(4096, 4096), metavar="OUTxIN")
    parser.add_argument("--formats", nargs="+", choices=formats.names(), default=list(FORMATS))
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--rules", nargs="*", choices=("mse", "signed-mse"), default=[])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if not BNB:
        print("bitsandbytes is not installed: its columns stay empty", file=sys.stderr)
    rows = list(cases(arguments))
    print(table(rows))
    if arguments.json:
        save(
            arguments.json,
            command=["benchmarks.cpu_quant", *(sys.argv[1:] if argv is None else argv)],
            rows=rows,
        )
    return 0


def _shape(text: str) -> tuple[int, int]:
    out_features, _, in_features = text.partition("x")
    return int(out_features), int(in_features)


if __name__ == "__main__":
    sys.exit(main())
