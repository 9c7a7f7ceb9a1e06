"""Suites of ``benchmarks.speed`` for LoRA layers, forward and backward: one, the MLP, and q, k and v."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import bench
from benchmarks.bench import Row
from benchmarks.gpu import measure
from quant.linear import QuantLinear
from quant.tensor import quantize


class DenseMlp(nn.Module):
    """The bound: three bf16 Linears without adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(bench.SIZES.hidden, bench.SIZES.width, bias=False)
        self.up_proj = nn.Linear(bench.SIZES.hidden, bench.SIZES.width, bias=False)
        self.down_proj = nn.Linear(bench.SIZES.width, bench.SIZES.hidden, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, hidden) -> (tokens, hidden)."""
        hidden: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return hidden


class DenseQkv(nn.Module):
    """The bound: q, k and v of grouped-query attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(bench.SIZES.hidden, bench.SIZES.hidden, bias=False)
        self.k_proj = nn.Linear(bench.SIZES.hidden, bench.SIZES.kv, bias=False)
        self.v_proj = nn.Linear(bench.SIZES.hidden, bench.SIZES.kv, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(tokens, hidden) -> three of (tokens, out)."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class DenseLinear(nn.Module):
    """The bound: one Linear, 4096 -> 14336."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(bench.SIZES.hidden, bench.SIZES.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, hidden) -> (tokens, width)."""
        y: Tensor = self.up_proj(x)
        return y


def quantised_lora(dense: nn.Module) -> nn.Module:
    """Our LoRA layers on NF4 weights in place of the Linears, factors in bf16."""
    from qlora_engine import fused_blocks
    from qlora_engine.config import LoraConfig
    from qlora_engine.lora import Linear

    config = LoraConfig(r=bench.RANK, lora_alpha=bench.RANK, init_lora_weights=False)
    for name, child in list(dense.named_children()):
        if isinstance(child, nn.Linear):
            base = QuantLinear.from_quantized(quantize(child.weight.detach(), bench.SPEC))
            setattr(dense, name, Linear(base, "default", config=config, r=bench.RANK, lora_alpha=bench.RANK))
    dense.to(bench.device(), torch.bfloat16)
    fused_blocks.enable(dense)
    return dense


def peft_lora(dense: nn.Module) -> nn.Module:
    """PEFT's layers on bitsandbytes' Linear4bit, factors in bf16."""
    import bitsandbytes as bnb
    from peft import LoraConfig
    from peft.tuners.lora.bnb import Linear4bit

    config = LoraConfig(r=bench.RANK, lora_alpha=bench.RANK, init_lora_weights=False)
    for name, child in list(dense.named_children()):
        if isinstance(child, nn.Linear):
            base = bnb.nn.Linear4bit(
                child.in_features,
                child.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                compress_statistics=True,
                quant_type="nf4",
            )
            base.weight = bnb.nn.Params4bit(
                child.weight.detach().cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4"
            )
            layer = Linear4bit(base.to("cuda"), "default", config=config, r=bench.RANK, lora_alpha=bench.RANK)
            setattr(dense, name, layer)
    for parameter_name, parameter in dense.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = parameter.data.to("cuda", torch.bfloat16)
    return dense.to("cuda")


def step_of(module: nn.Module, tokens: int) -> Callable[[], object]:
    """Forward and backward, gradients of the input and of whatever trains."""
    x = torch.randn(
        tokens, bench.SIZES.hidden, device=bench.device(), dtype=torch.bfloat16, requires_grad=True
    )
    leaves = [x, *[p for p in module.parameters() if p.requires_grad]]
    outputs = module(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.randn_like(y) for y in outputs]

    def step() -> object:
        y = module(x)
        return torch.autograd.grad(y if isinstance(y, tuple) else (y,), leaves, grads)

    return step


def compare_module(
    suite: str,
    make: Callable[[], nn.Module],
    tokens: tuple[int, ...],
    *,
    compute: str = "same",
    label: str = "",
    peft: bool = True,
) -> list[Row]:
    """Our layers, the dense bound and PEFT's, forward and backward.

    Args:
        suite: Its name.
        make: Makes the dense module.
        tokens: Numbers of tokens to measure at.
        compute: Of our layers: with "fp8" they are measured in bfloat16, too.
        label: Put before what each row is.
        peft: Whether PEFT's layers are measured.
    """
    from qlora_engine import set_compute

    torch.manual_seed(0)
    with torch.device(bench.device()):
        dense = make().to(torch.bfloat16).requires_grad_(False)
        ours = quantised_lora(make().to(torch.bfloat16).requires_grad_(False))
        theirs = None
        if peft and bench.peer("peft") and bench.peer("bitsandbytes"):
            theirs = peft_lora(make().to(torch.bfloat16).requires_grad_(False))
    rows = []
    for count in tokens:
        cases: list[tuple[str, nn.Module | None, bool, str]] = [
            ("dense", dense, True, "same"),
            ("ours", ours, True, "same"),
            ("ours, launched from Python", ours, False, "same"),
            ("PEFT, launched from Python", theirs, False, "same"),
        ]
        if compute != "same":
            cases = [*cases[:2], (f"ours, {compute}", ours, True, compute)]
        for what, module, graph, how in cases:
            if module is not None:
                if module is ours:
                    set_compute(ours, how)
                timing = measure(step_of(module, count), graph=graph)
                rows.append(bench.row(suite, label + what, timing, tokens=count))
        if bench.device() == "cuda":
            torch.cuda.empty_cache()
    bench.against(rows, label + "dense")
    return rows


def suite_linear() -> list[Row]:
    """One Linear of the MLP."""
    return compare_module("linear", DenseLinear, bench.SIZES.tokens)


def suite_mlp() -> list[Row]:
    """The SwiGLU MLP."""
    return compare_module("mlp", DenseMlp, bench.SIZES.tokens)


def suite_qkv() -> list[Row]:
    """Query, key and value."""
    return compare_module("qkv", DenseQkv, bench.SIZES.tokens[1:])
