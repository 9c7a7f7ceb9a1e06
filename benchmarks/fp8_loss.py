"""What compute="fp8" does to a real model: its loss and the gradients of its adapter, float32 beside it.

    python -m benchmarks.fp8_loss --windows 8 --json benchmarks/results/fp8-loss-smollm2.json

The model is quantised in place (NF4, LoftQ, rank 16) and run as it is, in bfloat16 and in float8, on windows
of Python's language reference. On a CPU the float8 products are torch's own, with exact float32 sums: the
rounding of operands is the GPU's, the order and precision of its sums are not.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common, real_models
from qlora_engine import LoftQConfig, LoraConfig, get_peft_model, set_compute
from quant.linear import QuantLinear


def measured(model: Any, tokens: Tensor) -> tuple[list[float], Tensor]:
    """The loss of each window and the adapter's gradient of their mean as one vector, float64."""
    model.zero_grad()
    losses = []
    for window in tokens:
        loss = model(input_ids=window[None], labels=window[None]).loss
        (loss / len(tokens)).backward()
        losses.append(loss.item())
    grads = [p.grad.double().flatten() for p in model.parameters() if p.requires_grad and p.grad is not None]
    return losses, torch.cat(grads)


def compare(model: Any, tokens: Tensor) -> list[dict[str, Any]]:
    """One row a way to compute; the first, float32, is what the others are compared with."""
    rows: list[dict[str, Any]] = []
    base: tuple[list[float], Tensor] | None = None
    for what, compute, dtype in (
        ("float32", "same", None),
        ("bfloat16 base products", "same", torch.bfloat16),
        ("float8 base products", "fp8", None),
    ):
        set_compute(model, compute)
        for module in model.modules():
            if isinstance(module, QuantLinear):
                module.compute_dtype = dtype
        losses, gradient = measured(model, tokens)
        base = base or (losses, gradient)
        change = torch.tensor(losses, dtype=torch.float64) - torch.tensor(base[0], dtype=torch.float64)
        cosine = torch.nn.functional.cosine_similarity(gradient, base[1], dim=0)
        rows.append(
            {
                "what": what,
                "windows": len(tokens),
                "tokens": tokens.numel(),
                "loss": sum(losses) / len(losses),
                "change of the loss": float(change.mean()),
                "largest change of a window": float(change.abs().max()),
                "gradient error": float((gradient - base[1]).norm() / base[1].norm()),
                "gradient cosine": float(cosine),
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a checkpoint folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(arguments)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = options.model or real_models.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = real_models.windows(
        real_models.python_topics(), tokenizer, count=options.windows, length=options.length
    )
    torch.manual_seed(0)
    config = LoraConfig(
        r=16,
        lora_alpha=16,
        target_modules="all-linear",
        init_lora_weights="loftq",
        loftq_config=LoftQConfig(loftq_bits=4),
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
    rows = compare(model, tokens)
    print(common.table(rows))
    if options.json:
        command = ["python", "-m", "benchmarks.fp8_loss", *(arguments or sys.argv[1:])]
        common.save(options.json, command=command, rows=rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
