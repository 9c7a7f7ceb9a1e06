"""Speed, each figure beside its peer and the dense bound in the same run.

    python -m benchmarks.speed --suite dequant,mlp --json speed.json     on a GPU
    python -m benchmarks.speed --suite cpu                               CPU seconds, one thread

Suites: dequant (decode and encode against a copy and bitsandbytes), linear, mlp, qkv (forward and backward of
LoRA layers of Llama-3-8B against dense bf16 layers and PEFT), solver (LoftQ against exact SVDs and PEFT's
algorithm); small (one token), fp8, group (LoftQ for several matrices at once), checkpoint (loftq-init from
disk to disk at the size of Llama-3-8B); cpu (quantise, dequantise and the layer on a CPU: cpu_quant.py and
cpu_linear.py); step (a training step beside PEFT: step.py). A peer that is not installed is named and
left out. ``--tiny`` runs a suite at small sizes and without peers, on a CPU too, where Triton interprets its
kernels: to see that it runs, not to time anything. ``benchmarks.speed_all`` runs all in one go.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common, cpu_linear, cpu_quant, step
from benchmarks.gpu import GpuTiming, measure, synchronize
from quant.linear import QuantLinear
from quant.spec import QuantSpec
from quant.tensor import quantize

RANK = 16
SPEC = QuantSpec("nf4", 64, True)
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is measured; the defaults are Llama-3-8B's."""

    hidden: int = 4096
    width: int = 14336
    kv: int = 1024
    head: int = 128
    layers: int = 32
    vocabulary: int = 128256
    tokens: tuple[int, ...] = (512, 2048, 8192)
    small_shapes: tuple[tuple[int, int], ...] = ((4096, 4096), (14336, 4096))
    solver_shapes: tuple[tuple[int, int], ...] = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
    solver_rank: int = 64
    group: int = 8


TINY = Sizes(
    hidden=64,
    width=96,
    kv=32,
    head=32,
    layers=2,
    vocabulary=128,
    tokens=(8, 16, 32),
    small_shapes=((64, 128),),
    solver_shapes=((96, 128),),
    solver_rank=4,
    group=3,
)
SIZES = Sizes()


def device() -> str:
    """Where the suites run: on a GPU, or with ``--tiny`` on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def peer(name: str) -> bool:
    """Whether a peer is measured: it is installed, and this is no tiny run."""
    return SIZES is not TINY and installed(name)


def installed(name: str) -> bool:
    """Whether a peer can be measured; says so on stderr where not."""
    found = importlib.util.find_spec(name) is not None
    if not found:
        print(f"{name} is not installed: its rows are left out", file=sys.stderr)
    return found


def row(suite: str, what: str, timing: GpuTiming, **more: Any) -> Row:
    """One line of the table."""
    return {
        "suite": suite,
        "what": what,
        **more,
        "ms": timing.median,
        "p20": timing.p20,
        "p80": timing.p80,
        "MiB": round(timing.peak_mib),
    }


def against(rows: list[Row], bound: str) -> None:
    """Add to each row its time as a multiple of the dense row called ``bound``, of the same case."""
    for line in rows:
        base = [r for r in rows if r["what"] == bound and r.get("tokens") == line.get("tokens")]
        if base:
            line["x dense"] = line["ms"] / base[0]["ms"]


def suite_dequant() -> list[Row]:
    """Decode and encode 4096 x 14336."""
    from quant.backends import triton_kernels

    weight = torch.randn(SIZES.hidden, SIZES.width, device=device(), dtype=torch.bfloat16)
    q = quantize(weight, SPEC)
    out, source = torch.empty_like(weight), torch.randn_like(weight)
    moved = q.nbytes + out.nbytes
    rows = []
    copy = measure(lambda: out.copy_(source), calls=10)
    rows.append(row("dequant", "copy", copy, TB_s=2 * out.nbytes / copy.median / 1e9))
    nested = (q.nested_scales, q.nested_offset, q.nested_map)
    fields: tuple[Any, ...] = (q.codes, q.scales, None, nested, SPEC.fmt, 64, 0, out)
    ours = measure(lambda: triton_kernels.dequantize_nested(*fields), calls=10)
    rows.append(row("dequant", "ours, nested", ours, TB_s=moved / ours.median / 1e9))
    for name in ("nf4", "nf3", "nf2", "int8", "uint4"):
        other = quantize(weight, QuantSpec(name))
        args = (other.codes, other.scales, other.zeros, other.spec.fmt, 64, 0, out)
        timing = measure(lambda args=args: triton_kernels.dequantize(*args), calls=10)
        speed = (other.nbytes + out.nbytes) / timing.median / 1e9
        rows.append(row("dequant", f"ours, {name}", timing, TB_s=speed))
    encoded = weight.nbytes + q.codes.nbytes + 4 * q.scales.numel()
    ours = measure(lambda: triton_kernels.quantize(weight, SPEC.fmt, 64), calls=10)
    rows.append(row("dequant", "ours, encode", ours, TB_s=encoded / ours.median / 1e9))
    grid = [0.6 + 0.03 * i for i in range(19)]
    base = q.dense_scales()
    multipliers = grid + [-m for m in grid]
    search = measure(
        lambda: triton_kernels.search_scales(weight, SPEC.fmt, 64, base, multipliers, None), graph=False
    )
    rows.append(row("dequant", "ours, signed scale search", search))
    if peer("bitsandbytes"):
        import bitsandbytes.functional as bnb

        codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        theirs = measure(lambda: bnb.dequantize_4bit(codes, state, out=out), calls=10)
        rows.append(row("dequant", "bitsandbytes, nested", theirs, TB_s=moved / theirs.median / 1e9))
        theirs = measure(lambda: bnb.quantize_4bit(weight, quant_type="nf4"), graph=False)
        rows.append(row("dequant", "bitsandbytes, encode", theirs, TB_s=encoded / theirs.median / 1e9))
    return rows


class DenseMlp(nn.Module):
    """The bound: three bf16 Linears without adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(SIZES.hidden, SIZES.width, bias=False)
        self.up_proj = nn.Linear(SIZES.hidden, SIZES.width, bias=False)
        self.down_proj = nn.Linear(SIZES.width, SIZES.hidden, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, hidden) -> (tokens, hidden)."""
        hidden: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return hidden


class DenseQkv(nn.Module):
    """The bound: q, k and v of grouped-query attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(SIZES.hidden, SIZES.hidden, bias=False)
        self.k_proj = nn.Linear(SIZES.hidden, SIZES.kv, bias=False)
        self.v_proj = nn.Linear(SIZES.hidden, SIZES.kv, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(tokens, hidden) -> three of (tokens, out)."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class DenseLinear(nn.Module):
    """The bound: one Linear, 4096 -> 14336."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(SIZES.hidden, SIZES.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, hidden) -> (tokens, width)."""
        y: Tensor = self.up_proj(x)
        return y


def quantised_lora(dense: nn.Module) -> nn.Module:
    """Our LoRA layers on NF4 weights in place of the Linears, factors in bf16."""
    from qlora_engine import fused_blocks
    from qlora_engine.config import LoraConfig
    from qlora_engine.lora import Linear

    config = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights=False)
    for name, child in list(dense.named_children()):
        if isinstance(child, nn.Linear):
            base = QuantLinear.from_quantized(quantize(child.weight.detach(), SPEC))
            setattr(dense, name, Linear(base, "default", config=config, r=RANK, lora_alpha=RANK))
    dense.to(device(), torch.bfloat16)
    fused_blocks.enable(dense)
    return dense


def peft_lora(dense: nn.Module) -> nn.Module:
    """PEFT's layers on bitsandbytes' Linear4bit, factors in bf16."""
    import bitsandbytes as bnb
    from peft import LoraConfig
    from peft.tuners.lora.bnb import Linear4bit

    config = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights=False)
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
            layer = Linear4bit(base.to("cuda"), "default", config=config, r=RANK, lora_alpha=RANK)
            setattr(dense, name, layer)
    for parameter_name, parameter in dense.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = parameter.data.to("cuda", torch.bfloat16)
    return dense.to("cuda")


def step_of(module: nn.Module, tokens: int) -> Callable[[], object]:
    """Forward and backward, gradients of the input and of whatever trains."""
    x = torch.randn(tokens, SIZES.hidden, device=device(), dtype=torch.bfloat16, requires_grad=True)
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
    with torch.device(device()):
        dense = make().to(torch.bfloat16).requires_grad_(False)
        ours = quantised_lora(make().to(torch.bfloat16).requires_grad_(False))
        theirs = None
        if peft and peer("peft") and peer("bitsandbytes"):
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
                rows.append(row(suite, label + what, timing, tokens=count))
        if device() == "cuda":
            torch.cuda.empty_cache()
    against(rows, label + "dense")
    return rows


def suite_linear() -> list[Row]:
    """One Linear of the MLP."""
    return compare_module("linear", DenseLinear, SIZES.tokens)


def suite_mlp() -> list[Row]:
    """The SwiGLU MLP."""
    return compare_module("mlp", DenseMlp, SIZES.tokens)


def suite_qkv() -> list[Row]:
    """Query, key and value."""
    return compare_module("qkv", DenseQkv, SIZES.tokens[1:])


def suite_solver() -> list[Row]:
    """LoftQ, rank 64, 5 iterations, against exact SVDs and PEFT's algorithm."""
    from qlora_engine import inits

    rows = []
    for shape in SIZES.solver_shapes:
        weight = torch.randn(shape, device=device())
        case = "x".join(map(str, shape))

        def solve(svd: str, weight: Tensor = weight) -> Any:
            return inits.initialise(
                weight,
                method="loftq",
                spec=QuantSpec(),
                rank=SIZES.solver_rank,
                iters=5,
                scales="absmax",
                svd=svd,
            )

        error = {svd: float(solve(svd).error) for svd in ("fast", "exact")}
        taken = {svd: seconds(lambda svd=svd: solve(svd), 5 if svd == "fast" else 1) for svd in error}
        peft = None
        if peer("peft") and peer("bitsandbytes"):
            from peft.utils.loftq_utils import loftq_init

            peft = seconds(
                lambda weight=weight: loftq_init(weight, num_bits=4, reduced_rank=64, num_iter=5), 1
            )
        rows.append(
            {
                "suite": "solver",
                "what": case,
                "ours s": taken["fast"],
                "exact SVD s": taken["exact"],
                "PEFT s": peft,
                "x faster than PEFT": None if peft is None else peft / taken["fast"],
                "error": error["fast"],
                "error / exact": error["fast"] / error["exact"],
            }
        )
    return rows


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median of so many calls; a single one, of a call of seconds, is not warmed up."""
    if repeats > 1:
        call()
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _extra(name: str) -> Callable[[], list[Row]]:
    """A suite of gpu_suites, which imports this module."""

    def run() -> list[Row]:
        from benchmarks import gpu_suites

        found: list[Row] = getattr(gpu_suites, f"suite_{name}")()
        return found

    return run


SUITES: dict[str, Callable[[], list[Row]]] = {
    "dequant": suite_dequant,
    "linear": suite_linear,
    "mlp": suite_mlp,
    "qkv": suite_qkv,
    "solver": suite_solver,
    **{name: _extra(name) for name in ("small", "fp8", "group", "checkpoint", "recipe")},
}


def cpu_commands(json_file: Path | None) -> list[tuple[Callable[[list[str]], int], list[str]]]:
    """The CPU's two benchmarks with their arguments; JSON goes beside ``json_file`` under their names."""
    commands: list[tuple[Callable[[list[str]], int], list[str]]] = [
        (cpu_quant.main, ["--formats", "nf4"]),
        (cpu_linear.main, []),
        (cpu_linear.main, ["--shape", "512x512"]),
    ]
    if json_file is not None:
        for (_, arguments), name in zip(commands, ("quant", "linear", "linear-small"), strict=True):
            arguments += ["--json", str(json_file.with_name(f"{json_file.stem}-{name}.json"))]
    return commands


def check() -> None:
    """Refuse to time wrong code: the kernels against the reference, on this device."""
    from quant.backends import reference, triton_kernels

    # Triton's interpreter truncates to bfloat16
    kind = torch.bfloat16 if device() == "cuda" else torch.float32
    weight = torch.randn(257, 320, device=device(), dtype=kind)
    for name in ("nf4", "nf3", "int8", "uint2"):
        fmt = QuantSpec(name).fmt
        want = reference.quantize(weight.cpu(), fmt, 64)
        for a, b in zip(want, triton_kernels.quantize(weight, fmt, 64), strict=True):
            if a is not None and not torch.equal(a, b.cpu()):  # type: ignore[union-attr]
                raise SystemExit(f"{name}: the kernel's codes differ from the reference's; nothing is timed")
        q = quantize(weight, QuantSpec(name))
        if not torch.equal(q.dequantize(backend="triton_kernels"), q.dequantize(backend="reference")):
            raise SystemExit(f"{name}: the kernel's values differ from the reference's; nothing is timed")


def main(arguments: list[str] | None = None) -> int:
    """Run the suites asked for, print a table each, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--suite",
        default=",".join(SUITES),
        help=f"comma-separated, of: {', '.join(SUITES)}; or cpu or step, by itself",
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument(
        "--tiny", action="store_true", help="small sizes, no peers, on a CPU too: does it run"
    )
    options = parser.parse_args(arguments)
    if options.suite == "cpu":
        return max(run(arguments) for run, arguments in cpu_commands(options.json))
    if options.suite == "step":
        json_file = [] if options.json is None else ["--json", str(options.json)]
        return step.main([*json_file, *(["--tiny"] if options.tiny else [])])
    unknown = set(options.suite.split(",")) - set(SUITES)
    if unknown:
        parser.error(f"unknown suite {sorted(unknown)}; known: {', '.join(SUITES)}")
    if not torch.cuda.is_available() and not options.tiny:
        print(
            "needs a CUDA GPU; --suite cpu measures the CPU, --tiny tries the suites there", file=sys.stderr
        )
        return 2
    with sized(options.tiny):
        return _run(options)


@contextlib.contextmanager
def sized(tiny: bool) -> Iterator[None]:
    """Inside, the suites have Llama-3-8B's sizes, or tiny ones and, on a CPU, the fused functions too."""
    from qlora_engine import fused

    global SIZES
    before, on_gpu = SIZES, fused.on_gpu
    if tiny:
        SIZES = TINY
        if device() == "cpu":
            os.environ.setdefault("TRITON_INTERPRET", "1")
            fused.on_gpu = lambda x: True
    try:
        yield
    finally:
        SIZES, fused.on_gpu = before, on_gpu


def _run(options: argparse.Namespace) -> int:
    check()
    rows: list[Row] = []
    for name in options.suite.split(","):
        found = SUITES[name]()
        rows += found
        print(f"\n## {name}\n\n{common.table(found)}", flush=True)
        if device() == "cuda":
            torch.cuda.empty_cache()
    if options.json:
        common.save(options.json, command=["python", "-m", "benchmarks.speed", *sys.argv[1:]], rows=rows)
    return 0


if __name__ == "__main__":
    from benchmarks import speed  # one module with one SIZES, which the other suites import, too

    raise SystemExit(speed.main())
