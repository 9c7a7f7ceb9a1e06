"""Everything of the GPU's side in one command, in under eight minutes on one H100:

    python -m benchmarks.speed_all --out results --seconds 470

Suites run in the order of what is not known yet; after each, its rows are written to OUT/gpu-SUITE.json, as
benchmarks/results has them, so that a run that is cut off keeps what it has. A suite whose estimate no longer
fits into --seconds is left out and named. A suite that fails is reported, and the next one runs.
``--tiny`` runs all of them small, on a CPU too.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path

import torch

from benchmarks import bench, common, speed

# Suite and about how many seconds it should take on an H100, compilation included: estimates, to decide what
# still fits, not measured yet.
ESTIMATES = {
    "dequant": 20,
    "mlp": 40,
    "group": 30,
    "small": 70,
    "fp8": 40,
    "checkpoint": 160,
    "recipe": 90,
    "linear": 20,
    "qkv": 25,
    "solver": 60,
}


def run_all(out: Path, seconds: float, *, tiny: bool) -> dict[str, str]:
    """Run what fits; what became of each suite: "done", "left out", or its error."""
    began = time.perf_counter()
    outcome: dict[str, str] = {}
    with bench.sized(tiny):
        speed.check()
        for name, estimate in ESTIMATES.items():
            left = seconds - (time.perf_counter() - began)
            if estimate > left:
                outcome[name] = f"left out: about {estimate} s, {left:.0f} s left"
                continue
            start = time.perf_counter()
            try:
                rows = speed.SUITES[name]()
            except (Exception, SystemExit) as error:  # whatever it is, the others are to be measured
                traceback.print_exc()
                outcome[name] = f"failed: {error}"
                continue
            took = time.perf_counter() - start
            outcome[name] = f"done in {took:.0f} s"
            print(f"\n## {name}, {took:.0f} s\n\n{common.table(rows)}", flush=True)
            command = ["python", "-m", "benchmarks.speed", "--suite", name]
            common.save(out / f"gpu-{name}.json", command=command, rows=rows)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return outcome


def main(arguments: list[str] | None = None) -> int:
    """Run, and say what became of each suite; 1 if one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--seconds", type=float, default=470.0, help="time to keep to")
    parser.add_argument(
        "--tiny", action="store_true", help="small sizes, no peers, on a CPU too: does it run"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.tiny:
        print("needs a CUDA GPU; --tiny tries the suites on a CPU", file=sys.stderr)
        return 2
    outcome = run_all(options.out, options.seconds, tiny=options.tiny)
    for name, what in outcome.items():
        print(f"{name:12} {what}", file=sys.stderr)
    return int(any(what.startswith("failed") for what in outcome.values()))


if __name__ == "__main__":
    raise SystemExit(main())
