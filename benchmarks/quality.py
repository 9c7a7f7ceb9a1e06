"""A real language model after quantisation: perplexity on two texts, KL to the original, errors, seconds.

    python -m benchmarks.quality --text wiki.test.txt --other-text other.txt --calibration-text wiki.valid.txt

SmolLM2-135M-Instruct (dequantised Q4_1) with every Linear but the head replaced by what would be stored.
Calibrated methods see ``--calibration-text`` only; ``--other-text`` is of another domain. Without files,
thirds of Python's own documentation serve. A GPU is used where there is one. ``--rows`` picks rows:
format:method:iterations:scales, such as nf3:recipe:1:signed-mse. ``--runs`` adds rows for folders that
loftq-init wrote, and ``--load-calibration`` takes what it kept: nothing is solved or calibrated twice.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.activations import linears, perplexity
from benchmarks.common import save, table
from benchmarks.real_models import load, python_topics, windows
from qlora_engine import from_pretrained, inits
from qlora_engine.calibration import Calibration, calibrate
from qlora_engine.report import RunReport
from quant import QuantizedTensor, QuantSpec

ROWS = [
    f"{fmt}:{method}"
    for fmt in ("nf4", "nf3", "nf2")
    for method in (
        "qlora:1:absmax",
        "loftq:1:absmax",
        "loftq:5:absmax",
        "loftq:5:signed-mse",
        "qera:1:absmax",
        "cloq:1:signed-mse",
        "recipe:1:signed-mse",
        "recipe:4:signed-mse",
    )
]


@torch.inference_mode()
def divergence(model: nn.Module, tokens: Tensor, reference: list[Tensor]) -> float:
    """Mean KL(original || model) of the next-token distributions, in nats."""
    total = 0.0
    for row, want in zip(tokens[: len(reference)], reference, strict=True):
        got = model(input_ids=row[None]).logits[0].float().log_softmax(-1)
        total += nn.functional.kl_div(got, want, log_target=True, reduction="batchmean").item()
    return total / len(reference)


@torch.inference_mode()
def log_probabilities(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """The model's next-token log-probabilities, one (length, vocabulary) a window."""
    return [model(input_ids=row[None]).logits[0].float().log_softmax(-1) for row in tokens]


def geometric(values: list[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def put_run(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Give ``model`` the weights of a finished loftq-init, adapter included; what its report says of it."""
    report = RunReport.read(folder)
    stored = from_pretrained(folder, dtype=torch.float32)
    factors = load_file(folder / "loftq_init" / "adapter_model.safetensors")
    modules, targets = dict(stored.named_modules()), linears(model)
    for layer in report.layers:
        dense = modules[layer.name].quantized().dequantize(torch.float32)
        prefix = f"base_model.model.{layer.name}"
        A, B = factors[f"{prefix}.lora_A.weight"], factors[f"{prefix}.lora_B.weight"]
        targets[layer.name].weight.data.copy_(dense + layer.scaling * B.float() @ A.float())
    numel = sum(layer.numel for layer in report.layers)
    outputs = [layer.output_error for layer in report.layers if layer.output_error is not None]
    return {
        "bits a weight": sum(layer.bits_per_weight * layer.numel for layer in report.layers) / numel,
        "rank": report.layers[0].rank,
        "weight error": geometric([layer.error for layer in report.layers]),
        "layer error (calibration text)": geometric(outputs) if len(outputs) == len(report.layers) else None,
        "solve s": sum(layer.seconds for layer in report.layers),
    }


def main(argv: list[str] | None = None) -> None:
    """Measure the rows asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, help="text to measure on")
    parser.add_argument("--other-text", type=Path, help="text of another domain")
    parser.add_argument("--calibration-text", type=Path, help="text to calibrate on")
    parser.add_argument("--windows", type=int, default=96)
    parser.add_argument("--other-windows", type=int, default=48)
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--rows", nargs="*", default=ROWS)
    parser.add_argument("--runs", nargs="*", type=Path, default=[], metavar="OUT", help="of loftq-init")
    parser.add_argument("--load-calibration", type=Path, metavar="FILE", help="of --save-calibration")
    parser.add_argument("--kl-windows", type=int, default=8, help="of the text (default 8)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load("smollm2")
    model.to(device)

    def cut(path: Path | None, count: int, part: int) -> Tensor:
        if path is None:
            made = windows(
                python_topics(), tokenizer, count=count, length=arguments.length, part=part, parts=3
            )
        else:
            made = windows(path.read_text(), tokenizer, count=count, length=arguments.length)
        return made.to(device)

    text = cut(arguments.text, arguments.windows, 0)
    other = cut(arguments.other_text, arguments.other_windows, 1) if arguments.other_windows else None
    reference = log_probabilities(model, text[: arguments.kl_windows])
    weights = {name: layer.weight.detach().clone() for name, layer in linears(model).items()}
    calibration = None
    if arguments.load_calibration is not None:
        calibration = Calibration.load(arguments.load_calibration)
    elif arguments.rows:
        seen = cut(arguments.calibration_text, arguments.calibration_windows, 2)
        calibration = calibrate(model, list(seen), list(weights))
        print(f"calibrated in {calibration.seconds:.1f} s", file=sys.stderr, flush=True)
    rows: list[dict[str, Any]] = []
    command = ["python", "-m", "benchmarks.quality", *(argv or sys.argv[1:])]

    def evaluate(name: str, facts: dict[str, Any]) -> None:
        row = {"row": name, "ppl": perplexity(model, text)}
        if other is not None:
            row["other ppl"] = perplexity(model, other)
        rows.append(row | {"KL": divergence(model, text, reference)} | facts)
        print(rows[-1], file=sys.stderr, flush=True)
        if arguments.json:  # after each row: a long run that is cut off has not measured in vain
            save(arguments.json, command=command, rows=rows)

    evaluate("float32", {})
    for folder in arguments.runs:
        evaluate(folder.name, put_run(model, folder))
    for name in arguments.rows:
        fmt, method, iters, scales = name.split(":")
        errors, outputs = [], []
        seconds = 0.0
        for layer, module in linears(model).items():
            weight = weights[layer]
            H = None if calibration is None else calibration.hessian(layer, weight)
            start = time.perf_counter()
            solved = inits.initialise(
                weight,
                method=method,
                spec=QuantSpec(fmt),
                rank=arguments.rank,
                iters=int(iters),
                scales=scales,
                hessian=None if H is None else H.to(device),
                damping=arguments.damping,
                name=layer,
            )
            if device == "cuda":
                torch.cuda.synchronize()
            seconds += time.perf_counter() - start
            assert isinstance(solved.base, QuantizedTensor)
            module.weight.data.copy_(solved.base.dequantize(torch.float32) + solved.B @ solved.A)
            errors.append(solved.error)
            outputs.append(solved.output_error or solved.error)
        facts = {
            "bits a weight": QuantSpec(fmt).bits_per_weight(),
            "rank": arguments.rank,
            "weight error": geometric(errors),
            "layer error (calibration text)": geometric(outputs),
            "solve s": seconds,
        }
        evaluate(name, facts)
    print(table(rows))


if __name__ == "__main__":
    main()
