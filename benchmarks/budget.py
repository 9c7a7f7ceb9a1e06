"""Widths shared out layer by layer against one width for all, at the same average bits.

    python -m benchmarks.budget --calibration-text wiki.valid.txt --text wiki.test.txt

all-MiniLM-L6-v2, every Linear of the encoder solved by recipe-fast. ``embedding_error`` is the relative
distance of the embeddings of 128 held-out sentences to the original model's, ``bits`` the average of what is
stored, scales included. Rows "by loss" weigh layers by how much the output minds them
(``qlora_engine.sensitivity``); with ``--relative`` others take the relative output errors as they are.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import save, table
from benchmarks.recipe_layers import Encoder, sentences
from qlora_engine import inits
from qlora_engine.allocate import LayerChoices, allocate, candidate_specs, layer_choices
from qlora_engine.calibrated_run import BUDGET_FORMATS
from qlora_engine.sensitivity import output_sensitivity
from quant import QuantizedTensor, QuantSpec


@dataclass
class Measured:
    """A way to choose the formats."""

    what: str
    bits: float
    formats: str
    embedding_error: float
    cosine: float


class Bench:
    """The model, what calibration found, and what each choice leaves of the embeddings."""

    def __init__(self, seen: list[str], unseen: list[str], rank: int) -> None:
        self.encoder, self.unseen, self.rank = Encoder(), unseen, rank
        self.original = self.encoder.embed(unseen)
        self.weights = {n: m.weight.detach().clone() for n, m in self.encoder.linears.items()}
        self.moments = self.encoder.moments(seen)
        ids = [self.encoder.tokenizer(s, truncation=True, max_length=256)["input_ids"] for s in seen[:64]]
        windows = [torch.tensor(row) for row in ids]
        self.minded = output_sensitivity(self.encoder.model, windows, list(self.weights))

    def choices(self, sensitivities: dict[str, Tensor] | None) -> list[LayerChoices]:
        specs = candidate_specs(BUDGET_FORMATS, (32, 64, 128), (True,))
        specs += candidate_specs(BUDGET_FORMATS, (64,), (False,))
        return layer_choices(self.weights.items(), specs, self.moments, sensitivities)

    def measure(self, what: str, specs: dict[str, QuantSpec]) -> Measured:
        bits, numel, counts = 0, 0, dict.fromkeys((s.format for s in specs.values()), 0)
        for name, W in self.weights.items():
            done = inits.initialise(
                W, method="recipe-fast", rank=self.rank, spec=specs[name], hessian=self.moments[name]
            )
            assert isinstance(done.base, QuantizedTensor)
            stored = done.base.dequantize(torch.float32) + done.B @ done.A
            self.encoder.linears[name].weight.data.copy_(stored)
            bits, numel = bits + 8 * done.base.nbytes, numel + W.numel()
            counts[specs[name].format] += 1
        now = self.encoder.embed(self.unseen)
        for name, W in self.weights.items():
            self.encoder.linears[name].weight.data.copy_(W)
        return Measured(
            what,
            bits / numel,
            ", ".join(f"{count} {name}" for name, count in sorted(counts.items())),
            float((now - self.original).norm() / self.original.norm()),
            float((now * self.original).sum(1).mean()),
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calibration-text", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="held out")
    parser.add_argument("--budgets", type=float, nargs="+", default=[2.5, 2.75, 3.5])
    parser.add_argument("--relative", action="store_true", help="share out by relative errors too")
    parser.add_argument("--uniform", nargs="+", default=["nf2", "nf3"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    command = ["python", "-m", "benchmarks.budget", *(sys.argv[1:] if arguments is None else arguments)]
    texts = [path.read_text("utf8") for path in (args.calibration_text, args.text)]
    bench = Bench(sentences(texts[0], 512), sentences(texts[1], 256)[:128], args.rank)
    rows: list[Measured] = []

    def add(what: str, specs: dict[str, QuantSpec]) -> None:
        rows.append(bench.measure(what, specs))
        print(rows[-1], file=sys.stderr, flush=True)
        if args.json is not None:
            save(args.json, command=command, rows=rows)

    began = time.process_time()
    choices: dict[str, Any] = {"loss": bench.choices(bench.minded)}
    if args.relative:
        choices["relative error"] = bench.choices(None)
    print(f"candidates in {time.process_time() - began:.0f} CPU s", file=sys.stderr, flush=True)
    for budget in args.budgets:
        for by, layers in choices.items():
            add(f"budget {budget:g} by {by}", allocate(layers, budget).specs)
    for name in args.uniform:
        add(f"{name} everywhere", dict.fromkeys(bench.weights, QuantSpec(name)))
    print(table([vars(row) for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
