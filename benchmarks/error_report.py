"""How much of a real model survives quantisation, by format, method, rank and iterations.

    python -m benchmarks.error_report --suite weights      relative weight error, both models
    python -m benchmarks.error_report --suite layers       and the relative error of the layers' outputs
    python -m benchmarks.error_report --suite perplexity   and the language model's perplexity
    python -m benchmarks.error_report --suite finetune     and that after a short fine-tuning from each start

Each row has its peers beside it: plain quantisation to the same format ("plain"), PEFT's LoftQ ("peft", 4
bits only) and, where it is fine-tuned, QLoRA's start ("qlora", B = 0). Layer outputs and perplexity are
measured on text that calibration and training never saw. Weight and layer errors are geometric means over the
Linears of ||E||_F / ||W||_F and sqrt(tr(E H E^T) / tr(W H W^T)), where E is what is missing from what would
be stored.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.activations import input_moments, linears, perplexity
from benchmarks.common import save, table
from benchmarks.peers import peft_loftq
from benchmarks.real_models import load, python_topics, windows
from benchmarks.short_finetune import Start, finetune
from qlora_engine import inits
from qlora_engine.hessian import energy
from quant import QuantizedTensor, QuantSpec, quantize

FORMATS = {"weights": ("nf4", "fp4", "int4", "nf3", "int3", "nf2"), "layers": ("nf4", "nf3", "nf2")}
FORMATS |= dict.fromkeys(("perplexity", "finetune"), FORMATS["layers"])
# Of calibrated methods that alternate; the others solve once.
ALTERNATIONS = {"qera-alternating": (5,), "recipe": (1, 4)}
RANKS = {"weights": (8, 16, 64), "layers": (16,), "perplexity": (16,), "finetune": (16,)}


@dataclass(frozen=True)
class Candidate:
    """One way to store a weight: a name of ``inits``, "plain" (no factors) or "peft"."""

    method: str
    spec: QuantSpec
    rank: int = 0
    iters: int = 0
    scales: str = "absmax"

    def solve(self, weight: Tensor, hessian: Tensor | None) -> Tensor:
        """What would be stored for a float32 weight (out, in), dequantised and corrected, float32."""
        if self.method == "plain":
            return quantize(weight, self.spec, scales=self.scales).dequantize()
        base, A, B = self.start(weight, hessian)
        return base + B @ A

    def start(self, weight: Tensor, hessian: Tensor | None) -> Start:
        """The dequantised base (out, in), A (rank, in) and B (out, rank) at scaling 1, float32."""
        if self.method == "peft":
            return peft_loftq(weight, self.rank, self.iters)
        solved = inits.initialise(
            weight,
            method=self.method,
            spec=self.spec,
            rank=self.rank,
            iters=max(self.iters, 1),
            scales=self.scales,
            hessian=hessian,
        )
        assert isinstance(solved.base, QuantizedTensor)
        return solved.base.dequantize(torch.float32), solved.A.float(), solved.B.float()


def candidates(suite: str, formats: list[str], *, block_size: int, peft: bool) -> Iterator[Candidate]:
    """The rows of a suite: for each format the plain ones, then by rank those with factors."""
    for name in formats:
        spec = QuantSpec(name, block_size)
        if suite == "finetune":
            yield Candidate("qlora", spec, RANKS[suite][0])
        for scales in ("absmax", "mse", "signed-mse") if suite == "weights" else ("absmax", "signed-mse"):
            yield Candidate("plain", spec, scales=scales)
        for rank in RANKS[suite]:
            if peft and name == "nf4" and block_size == 64 and rank == 16:
                yield Candidate("peft", spec, rank, 1)
                yield Candidate("peft", spec, rank, 5)
            loftq = Candidate("loftq", spec, rank, 5)
            yield replace(loftq, iters=1)
            yield loftq
            yield replace(loftq, scales="signed-mse")
            for method in inits.names():
                known = inits.get(method)
                if known.quantizes and known.corrects and method != "loftq":
                    if not known.needs_hessian:
                        yield replace(loftq, method=method)
                        yield replace(loftq, method=method, scales="signed-mse")
                    elif suite != "weights":
                        for count in ALTERNATIONS.get(method, (1,)):
                            yield replace(loftq, method=method, iters=count, scales="signed-mse")


@dataclass
class Measured:
    """A row of the report. ``vs_plain``: its last measure over plain quantisation's (QLoRA's start's)."""

    model: str
    format: str
    bits: float
    method: str
    rank: int
    iters: int
    scales: str
    weight_error: float
    layer_error: float | None = None
    perplexity: float | None = None
    finetuned: float | None = None
    vs_plain: float | None = None
    cpu_seconds: float = 0.0


def measure(
    model_name: str,
    model: nn.Module,
    candidate: Candidate,
    weights: dict[str, Tensor],
    *,
    calibration: dict[str, Tensor],
    held_out: dict[str, Tensor],
    evaluation: Tensor | None,
    training: Tensor | None = None,
    settings: dict[str, Any] | None = None,
) -> Measured:
    """Solve every weight; with ``evaluation`` tokens, also run the model with what would be stored, and with
    ``training`` tokens fine-tune it from there."""
    weight_logs, layer_logs, seconds = [], [], 0.0
    modules = linears(model)
    starts: dict[str, Start] = {}
    for name, weight in weights.items():
        began = time.process_time()
        if training is not None:
            starts[name] = candidate.start(weight, calibration.get(name))
            base, A, B = starts[name]
            stored = base + B @ A
        else:
            stored = candidate.solve(weight, calibration.get(name))
        seconds += time.process_time() - began
        error = weight - stored
        weight_logs.append(0.5 * math.log(energy(error, None) / energy(weight, None)))
        if name in held_out:
            layer_logs.append(0.5 * math.log(energy(error, held_out[name]) / energy(weight, held_out[name])))
        if evaluation is not None and training is None:
            modules[name].weight.data.copy_(stored)
    row = Measured(
        model_name,
        candidate.spec.format,
        candidate.spec.bits_per_weight(),
        candidate.method,
        candidate.rank,
        candidate.iters,
        candidate.scales,
        weight_error=math.exp(sum(weight_logs) / len(weight_logs)),
        layer_error=math.exp(sum(layer_logs) / len(layer_logs)) if layer_logs else None,
        cpu_seconds=seconds,
    )
    if evaluation is not None and training is not None:
        row.perplexity, row.finetuned = finetune(model, starts, training, evaluation, **(settings or {}))
    elif evaluation is not None:
        row.perplexity = perplexity(model, evaluation)
        for name, weight in weights.items():
            modules[name].weight.data.copy_(weight)
    return row


def run(arguments: argparse.Namespace) -> list[Measured]:
    """All rows of the suite, printed as they come."""
    rows: list[Measured] = []
    text = Path(arguments.text).read_text() if arguments.text else python_topics()
    calibration_text = Path(arguments.calibration_text).read_text() if arguments.calibration_text else None
    generates = arguments.suite in ("perplexity", "finetune")
    names = ["smollm2"] if generates else arguments.model
    for model_name in names:
        model, tokenizer = load(model_name)
        cut = {"count": arguments.windows, "length": min(arguments.length, tokenizer.model_max_length)}
        if calibration_text is None:  # two halves of one text
            seen = windows(text, tokenizer, **cut, part=0, parts=2)
            unseen = windows(text, tokenizer, **cut, part=1, parts=2)
        else:
            seen = windows(calibration_text, tokenizer, **cut)
            unseen = windows(text, tokenizer, **cut)
        chosen = list(linears(model))[:: arguments.every]
        weights = {name: linears(model)[name].weight.detach().clone() for name in chosen}
        with_outputs = arguments.suite != "weights"
        calibration = input_moments(model, seen, chosen) if with_outputs else {}
        held_out = input_moments(model, unseen, chosen) if with_outputs else {}
        evaluation = unseen if generates else None
        training = seen if arguments.suite == "finetune" else None
        settings = {"steps": arguments.steps, "batch": arguments.batch, "rate": arguments.learning_rate}
        if evaluation is not None:
            rows.append(_untouched(model_name, model, evaluation))
        plain: dict[str, float] = {}
        chosen_formats = arguments.formats or list(FORMATS[arguments.suite])
        for candidate in candidates(
            arguments.suite, chosen_formats, block_size=arguments.block_size, peft=not arguments.skip_peft
        ):
            if arguments.methods and candidate.method not in ("plain", "qlora", *arguments.methods):
                continue
            if training is not None and candidate.method == "plain":
                continue  # nothing of it trains
            row = measure(
                model_name,
                model,
                candidate,
                weights,
                calibration=calibration,
                held_out=held_out,
                evaluation=evaluation,
                training=training,
                settings=settings,
            )
            last = row.finetuned or row.perplexity or row.layer_error or row.weight_error
            if candidate.method in ("plain", "qlora") and candidate.scales == "absmax":
                plain[row.format] = last
            row.vs_plain = last / plain[row.format]
            rows.append(row)
            _say(row)
            if arguments.json:  # after each row: a long run that is cut off has not measured in vain
                save(arguments.json, command=arguments.command, rows=rows)
    return rows


def _untouched(model_name: str, model: nn.Module, evaluation: Tensor) -> Measured:
    row = Measured(
        model_name, "float32", 32.0, "untouched", 0, 0, "", 0.0, perplexity=perplexity(model, evaluation)
    )
    _say(row)
    return row


def _say(row: Measured) -> None:
    measures = [row.weight_error, row.layer_error, row.perplexity, row.finetuned]
    found = " ".join(f"{value:.4g}" for value in measures if value is not None)
    setting = f"{row.format} {row.method} rank {row.rank} iterations {row.iters} {row.scales}"
    print(f"{row.model} {setting}: {found} ({row.cpu_seconds:.1f} s)", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=list(FORMATS), default="weights")
    parser.add_argument("--model", choices=["smollm2", "minilm"], nargs="+", default=["minilm", "smollm2"])
    parser.add_argument("--formats", nargs="+", help="only these formats")
    parser.add_argument("--methods", nargs="+", help="only these methods, beside the plain rows")
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth Linear")
    parser.add_argument("--steps", type=int, default=30, help="fine-tuning steps (default 30)")
    parser.add_argument("--batch", type=int, default=4, help="windows a step (default 4)")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="of AdamW (default 0.0002)")
    parser.add_argument("--windows", type=int, default=32, help="windows of text (default 32)")
    parser.add_argument("--length", type=int, default=512, help="tokens a window (default 512)")
    parser.add_argument("--text", metavar="FILE", help="held-out text (default: Python's own topics)")
    parser.add_argument("--calibration-text", metavar="FILE", help="text to calibrate on")
    parser.add_argument("--skip-peft", action="store_true", help="leave out PEFT's rows (exact SVDs, slow)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
    arguments = parser.parse_args(argv)
    arguments.command = ["benchmarks.error_report", *(sys.argv[1:] if argv is None else argv)]
    torch.set_num_threads(arguments.threads)
    print(table([_shown(row) for row in run(arguments)]))


def _shown(row: Measured) -> dict[str, Any]:
    """The row without the columns that its suite does not measure."""
    return {key: value for key, value in vars(row).items() if value is not None}


if __name__ == "__main__":
    main()
