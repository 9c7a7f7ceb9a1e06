"""One layer's experts, quantised and dense: time of forward and backward, memory held and at the peak.

    python -m benchmarks.experts --json benchmarks/results/experts-h100.json      (a GPU)
    python -m benchmarks.experts --sizes tiny --device cpu

Dense and quantised experts run as transformers' "grouped_mm" and "eager" (one by one), quantised ones with
and without LoRA.
Routing is uniform. "held" is what the weights take, "peak" what a step adds to it.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common
from qlora_engine import LoraConfig, inject_adapter_in_model, quantize_experts

# experts, chosen for a token, hidden width, width of an expert
SIZES = {"mixtral-8x7b": (8, 2, 4096, 14336), "qwen3-30b": (128, 8, 2048, 768), "tiny": (4, 2, 64, 48)}


class Layer(nn.Module):
    """A model that is one layer's experts."""

    def __init__(self, experts: int, chosen: int, hidden: int, width: int) -> None:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        super().__init__()
        self.settings = MixtralConfig(
            num_local_experts=experts,
            num_experts_per_tok=chosen,
            hidden_size=hidden,
            intermediate_size=width,
        )
        self.experts = MixtralExperts(self.settings)
        with torch.no_grad():
            for parameter in self.experts.parameters():
                parameter.normal_(std=0.02)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """(tokens, hidden) -> the same."""
        y: Tensor = self.experts(x, index, weights)
        return y


def _variants(dense: Layer) -> dict[str, tuple[Layer, str]]:
    nf4 = copy.deepcopy(dense)
    quantize_experts(nf4, "nf4")
    adapted = copy.deepcopy(nf4)
    config = LoraConfig(r=16, target_modules=[], target_parameters=["gate_up_proj", "down_proj"])
    inject_adapter_in_model(config, adapted)
    return {
        "dense, grouped_mm": (dense, "grouped_mm"),
        "dense, eager": (dense, "eager"),
        "nf4": (nf4, "eager"),
        "nf4, LoRA 16": (adapted, "eager"),
        "nf4, grouped_mm": (nf4, "grouped_mm"),
        "nf4, LoRA 16, grouped_mm": (adapted, "grouped_mm"),
    }


def _bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def measure(size: str, tokens: int, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """A row for each variant."""
    experts, chosen, hidden, width = SIZES[size]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        torch.manual_seed(0)
        dense = Layer(experts, chosen, hidden, width).to(dtype).requires_grad_(False)
        x = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
        index = torch.rand(tokens, experts).argsort(-1)[:, :chosen].contiguous()
        weights = torch.full((tokens, chosen), 1 / chosen, dtype=dtype)
    variants = _variants(dense)

    def step(model: Layer, implementation: str) -> Callable[[], None]:
        def run() -> None:
            model.settings._experts_implementation = implementation
            for module in model.modules():
                if hasattr(module, "config"):
                    module.config = model.settings
            model(x, index, weights).sum().backward()

        return run

    calls = {name: step(*variant) for name, variant in variants.items()}
    timings = common.time_each(calls, repeats=repeats)
    rows = []
    for name, (model, _) in variants.items():
        peak = None
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            calls[name]()
            peak = (torch.cuda.max_memory_allocated() - before) / 1e6
        row = {"size": size, "tokens": tokens, "experts": name, "ms": timings[name].median * 1e3}
        rows.append(row | {"held MB": _bytes(model) / 1e6, "peak MB": peak})
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["mixtral-8x7b", "qwen3-30b"], choices=list(SIZES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 64, 2048])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for size in given.sizes:
        for tokens in given.tokens:
            rows += measure(size, tokens, torch.device(given.device), given.repeats)
    print(common.table(rows))
    if given.json is not None:
        command = ["python", "-m", "benchmarks.experts", *(sys.argv[1:] if arguments is None else arguments)]
        common.save(given.json, command=command, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
