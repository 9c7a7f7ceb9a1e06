"""LoftQ on a CPU: seconds and error with the fast SVD, with exact SVDs, and in PEFT's algorithm, in one run.

    python -m benchmarks.solver_cpu                       4096 x 4096, rank 64, 5 iterations
    python -m benchmarks.solver_cpu --exact-iters 5       exact SVDs in full: minutes
    python -m benchmarks.solver_cpu --suite svd           the truncated SVD alone, over shapes and ranks

Exact SVDs and PEFT are timed over ``--exact-iters`` iterations (1 unless told) and multiplied up to
``--iters``: every iteration of theirs does the same work. Errors are compared at equal iterations. PEFT's
function, which needs a GPU, runs with the name of its device replaced. ``cpu s`` counts all threads.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import save, table
from benchmarks.peers import peft_loftq
from qlora_engine.inits import Initialised, initialise
from qlora_engine.inits.method import frobenius
from qlora_engine.lowrank import truncated_svd
from quant import QuantizedTensor, QuantSpec, quantize

CONTRACT = 1.001  # error over that of exact SVDs
SVD_CASES = [
    # (out, in, rank)
    (576, 576, 16),
    (192, 576, 16),
    (1536, 576, 16),
    (1024, 1024, 16),
    (1024, 1024, 64),
    (1024, 1024, 256),
    (2048, 2048, 64),
    (1024, 4096, 64),
    (4096, 1024, 64),
    (2048, 2048, 1),
]


def matrix(kind: str, out_features: int, in_features: int) -> Tensor:
    """A float32 weight: "gaussian", or "heavy": Student's t with 3 degrees of freedom and outlier columns."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(out_features, in_features, generator=generator)
    if kind == "heavy":
        squares = torch.zeros_like(W)
        for _ in range(3):
            squares += torch.randn(W.shape, generator=generator).square_()
        W /= squares.div_(3).sqrt_()
        W[:, ::97] *= 8
    return W * 0.02


class Stopwatch:
    """Wall and CPU seconds of calls."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def __call__(self, call: Callable[[], Any]) -> Any:
        cpu, wall = time.process_time(), time.perf_counter()
        result = call()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        return result

    def medians(self) -> tuple[float, float]:
        return statistics.median(self.wall), statistics.median(self.cpu)


def loftq_rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Ours, exact SVDs and PEFT on each shape and kind of matrix."""
    spec, rank, iters, few = QuantSpec("nf4"), arguments.rank, arguments.iters, arguments.exact_iters
    if not arguments.skip_peft:
        peft_loftq(matrix("gaussian", 64, 64), 4, 1)  # its imports are not its work
    for shape in arguments.shapes:
        for kind in ("gaussian", "heavy"):
            W = matrix(kind, *shape)

            def solve(svd: str, count: int, W: Tensor = W) -> Initialised:
                return initialise(W, method="loftq", rank=rank, spec=spec, iters=count, svd=svd)

            solve("fast", 1)
            ours, exact, peft = Stopwatch(), Stopwatch(), Stopwatch()
            for _ in range(arguments.repeats):
                done = ours(lambda: solve("fast", iters))
            slow = exact(lambda: solve("exact", few))
            same = solve("fast", few)
            row = {
                "matrix": kind,
                "shape": "x".join(map(str, shape)),
                "rank": rank,
                "iters": iters,
                "plain": done.error_plain,
                "error": done.error,
                "ours s": ours.medians()[0],
                "ours cpu s": ours.medians()[1],
                "exact s": exact.wall[0] * iters / few,
                "exact cpu s": exact.cpu[0] * iters / few,
                "x exact": exact.wall[0] * iters / few / ours.medians()[0],
                "x exact cpu": exact.cpu[0] * iters / few / ours.medians()[1],
                "exact iters timed": few,
                "error / exact": same.error / slow.error,
            }
            if not arguments.skip_peft:
                Q, A, B = peft(lambda W=W: peft_loftq(W, rank, few))
                row["peft s"] = peft.wall[0] * iters / few
                row["x peft"] = row["peft s"] / row["ours s"]
                row["error / peft"] = same.error * frobenius(W) / frobenius(W - Q - B @ A)
            yield row


def svd_rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The truncated SVD of quantisation noise, cold and warm, against LAPACK's."""
    for out_features, in_features, rank in SVD_CASES:
        for kind in ("gaussian", "heavy"):
            W = matrix(kind, out_features, in_features)
            M = residual(W)
            exact, cold, warm = Stopwatch(), Stopwatch(), Stopwatch()
            U, S, Vh = exact(lambda M=M: torch.linalg.svd(M, full_matrices=False))
            best = frobenius(M - (U[:, :rank] * S[:rank]) @ Vh[:rank])
            for _ in range(arguments.repeats):
                u, s, vh = cold(lambda M=M, rank=rank: truncated_svd(M, rank))
            # What LoftQ's next iteration decomposes, from this iteration's row space.
            following = residual(W - (u * s) @ vh, W)
            for _ in range(arguments.repeats):
                again = warm(lambda F=following, rank=rank, vh=vh: truncated_svd(F, rank, start=vh.mT))
            U, S, Vh = torch.linalg.svd(following, full_matrices=False)
            left = frobenius(following - (U[:, :rank] * S[:rank]) @ Vh[:rank])
            yield {
                "matrix": kind,
                "shape": f"{out_features}x{in_features}",
                "rank": rank,
                "cold / best": frobenius(M - (u * s) @ vh) / best,
                "warm / best": frobenius(following - (again[0] * again[1]) @ again[2]) / left,
                "cold cpu ms": cold.medians()[1] * 1e3,
                "warm cpu ms": warm.medians()[1] * 1e3,
                "exact cpu ms": exact.cpu[0] * 1e3,
                "x exact cpu": exact.cpu[0] / cold.medians()[1],
            }


def residual(target: Tensor, weight: Tensor | None = None) -> Tensor:
    """What NF4 of ``target`` leaves of ``weight``."""
    base: QuantizedTensor = quantize(target, QuantSpec("nf4"))
    return (target if weight is None else weight) - base.dequantize()


SUITES = {"loftq": loftq_rows, "svd": svd_rows}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=SUITES, default="loftq")
    parser.add_argument("--shapes", nargs="+", type=_shape, default=[(4096, 4096)], metavar="OUTxIN")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--iters", type=int, default=5)
    parser.add_argument("--exact-iters", type=int, default=1, help="iterations of the exact peers to time")
    parser.add_argument("--repeats", type=int, default=3, help="runs of ours; the median is reported")
    parser.add_argument("--skip-peft", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    rows = []
    for row in SUITES[arguments.suite](arguments):
        rows.append(row)
        print(row["matrix"], row["shape"], row["rank"], file=sys.stderr, flush=True)
    print(table([_shown(row) for row in rows]))
    print(f"peak RSS {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    if arguments.json:
        save(arguments.json, command=["benchmarks.solver_cpu", *(argv or sys.argv[1:])], rows=rows)
    wrong = [
        row for row in rows if max(v for k, v in row.items() if k.endswith(("/ exact", "/ best"))) > CONTRACT
    ]
    for row in wrong:
        print(f"above {CONTRACT}: {row}", file=sys.stderr)
    return 1 if wrong else 0


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """Ratios near one with the digits that matter."""
    return {key: f"{value:.6f}" if " / " in key else value for key, value in row.items()}


def _shape(text: str) -> tuple[int, int]:
    out_features, _, in_features = text.partition("x")
    return int(out_features), int(in_features)


if __name__ == "__main__":
    sys.exit(main())
