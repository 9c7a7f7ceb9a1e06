"""Suites of ``benchmarks.speed`` for kernels, float8, the solver and whole checkpoints.

Every suite first compares what it times with the reference, and times nothing that is wrong.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import bench, layer_suites
from benchmarks.bench import Row
from benchmarks.gpu import measure, synchronize
from quant import fp8, small
from quant.spec import QuantSpec
from quant.tensor import quantize


def _agree(what: str, got: Tensor, want: Tensor, bound: float) -> None:
    error = float((got.float() - want.float()).norm() / want.float().norm())
    if not error <= bound:
        raise SystemExit(f"{what}: {error:.2g} off the reference (allowed {bound:g}); nothing is timed")


def suite_dequant() -> list[Row]:
    """Decode and encode 4096 x 14336."""
    from quant.backends import triton_kernels

    weight = torch.randn(bench.SIZES.hidden, bench.SIZES.width, device=bench.device(), dtype=torch.bfloat16)
    q = quantize(weight, bench.SPEC)
    out, source = torch.empty_like(weight), torch.randn_like(weight)
    moved = q.nbytes + out.nbytes
    rows = []
    copy = measure(lambda: out.copy_(source), calls=10)
    rows.append(bench.row("dequant", "copy", copy, TB_s=2 * out.nbytes / copy.median / 1e9))
    nested = (q.nested_scales, q.nested_offset, q.nested_map)
    fields: tuple[Any, ...] = (q.codes, q.scales, None, nested, bench.SPEC.fmt, 64, 0, out)
    ours = measure(lambda: triton_kernels.dequantize_nested(*fields), calls=10)
    rows.append(bench.row("dequant", "ours, nested", ours, TB_s=moved / ours.median / 1e9))
    for name in ("nf4", "nf3", "nf2", "int8", "uint4"):
        other = quantize(weight, QuantSpec(name))
        args = (other.codes, other.scales, other.zeros, other.spec.fmt, 64, 0, out)
        timing = measure(lambda args=args: triton_kernels.dequantize(*args), calls=10)
        speed = (other.nbytes + out.nbytes) / timing.median / 1e9
        rows.append(bench.row("dequant", f"ours, {name}", timing, TB_s=speed))
    encoded = weight.nbytes + q.codes.nbytes + 4 * q.scales.numel()
    ours = measure(lambda: triton_kernels.quantize(weight, bench.SPEC.fmt, 64), calls=10)
    rows.append(bench.row("dequant", "ours, encode", ours, TB_s=encoded / ours.median / 1e9))
    grid = [0.6 + 0.03 * i for i in range(19)]
    base = q.dense_scales()
    multipliers = grid + [-m for m in grid]
    search = measure(
        lambda: triton_kernels.search_scales(weight, bench.SPEC.fmt, 64, base, multipliers, None), graph=False
    )
    rows.append(bench.row("dequant", "ours, signed scale search", search))
    if bench.peer("bitsandbytes"):
        import bitsandbytes.functional as bnb

        codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        theirs = measure(lambda: bnb.dequantize_4bit(codes, state, out=out), calls=10)
        rows.append(bench.row("dequant", "bitsandbytes, nested", theirs, TB_s=moved / theirs.median / 1e9))
        theirs = measure(lambda: bnb.quantize_4bit(weight, quant_type="nf4"), graph=False)
        rows.append(bench.row("dequant", "bitsandbytes, encode", theirs, TB_s=encoded / theirs.median / 1e9))
    return rows


def suite_small() -> list[Row]:
    """One token: decode and multiply, bitsandbytes' GEMV, and dense."""
    rows: list[Row] = []
    for shape in bench.SIZES.small_shapes:
        weight = torch.randn(shape, device=bench.device(), dtype=torch.bfloat16)
        q = quantize(weight, bench.SPEC)
        dense = q.dequantize(torch.bfloat16)
        x = torch.randn(1, shape[1], device=bench.device(), dtype=torch.bfloat16)
        case = {"shape": "x".join(map(str, shape)), "tokens": 1}
        calls: dict[str, Callable[[], object]] = {
            "dense": lambda x=x, W=dense: x @ W.t(),
            "decode and multiply": lambda x=x, q=q: x @ q.dequantize(torch.bfloat16).t(),
        }
        if bench.peer("bitsandbytes"):
            y = small.multiply(x, q, None)
            if y is not None:
                _agree("bitsandbytes' GEMV", y, x @ dense.t(), 1e-2)
                calls["bitsandbytes GEMV"] = lambda x=x, q=q: small.multiply(x, q, None)
        found = [bench.row("small", what, measure(call, calls=10), **case) for what, call in calls.items()]
        for line in found:
            line["x dense"] = line["ms"] / found[0]["ms"]
        rows += found
    return rows


def suite_fp8() -> list[Row]:
    """Float8 products: the parts, and the MLP and one Linear forward and backward beside bfloat16."""
    reason = fp8.unavailable(torch.device(bench.device()))
    if reason is not None:
        print(f"fp8 is left out: {reason}", flush=True)
        return []
    rows: list[Row] = []
    hidden, width = bench.SIZES.hidden, bench.SIZES.width
    weight = torch.randn(width, hidden, device=bench.device(), dtype=torch.bfloat16)
    q = quantize(weight, bench.SPEC)
    dense = q.dequantize(torch.bfloat16)
    tokens = bench.SIZES.tokens[-1]
    x = torch.randn(tokens, hidden, device=bench.device(), dtype=torch.bfloat16)
    buffer = torch.empty(width, hidden, device=bench.device(), dtype=torch.float8_e4m3fn)
    turned = torch.empty(hidden, width, device=bench.device(), dtype=torch.float8_e4m3fn)
    y = fp8.multiply(x, q, None, buffer)
    _agree("float8 product", y, x @ dense.t(), 0.06)
    _agree("float8 dX", fp8.multiply_transposed(y, q, turned), y @ dense, 0.06)
    x8, scales = fp8.quantize_rows(x)
    ones = torch.ones(1, width, device=x.device)

    def gemm(fast: bool) -> Tensor:
        out: Tensor = torch._scaled_mm(
            x8,
            buffer.t(),
            scale_a=scales[:, None],
            scale_b=ones,
            out_dtype=torch.bfloat16,
            use_fast_accum=fast,
        )
        return out

    parts: list[tuple[str, Callable[[], object]]] = [
        ("dense bf16 GEMM", lambda: x @ dense.t()),
        ("float8 GEMM", lambda: gemm(True)),
        ("float8 GEMM, exact sums", lambda: gemm(False)),
        ("weight to float8", lambda: fp8.weight(q, buffer, transposed=False)),
        ("weight to float8, transposed", lambda: fp8.weight(q, turned, transposed=True)),
        ("activations to float8", lambda: fp8.quantize_rows(x)),
        ("gradients to float8", lambda: fp8.quantize_rows(y, scales.new_ones(width))),
    ]
    for what, call in parts:
        rows.append(bench.row("fp8", what, measure(call, calls=4), tokens=tokens))
    del parts
    for suite, make in (("linear", layer_suites.DenseLinear), ("mlp", layer_suites.DenseMlp)):
        rows += layer_suites.compare_module(
            "fp8", make, bench.SIZES.tokens[1:], compute="fp8", label=f"{suite}: "
        )
    return rows


def suite_group() -> list[Row]:
    """LoftQ, rank 64, 5 iterations: matrices of one shape solved together, seconds a matrix."""
    from qlora_engine.inits import initialise, initialise_many

    rows: list[Row] = []
    rank = bench.SIZES.solver_rank
    settings: dict[str, Any] = {"method": "loftq", "rank": rank, "spec": QuantSpec(), "iters": 5}

    def together(weights: list[Tensor]) -> list[float]:
        return [found.error for found in initialise_many(weights, [None] * len(weights), **settings)]

    for shape in bench.SIZES.solver_shapes:
        weights = [torch.randn(shape, device=bench.device()) for _ in range(bench.SIZES.group)]
        alone = [initialise(weight, **settings).error for weight in weights]
        worst = max(a / b for a, b in zip(together(weights), alone, strict=True))
        if worst > 1.0005:
            raise SystemExit(f"together the error is {worst:.5f} times that of one alone; nothing is timed")
        line: Row = {"suite": "group", "what": "x".join(map(str, shape)), "error / alone": worst}
        line["alone s"] = bench.seconds(partial(initialise, weights[0], **settings), 3)
        for count in sorted({2, len(weights) // 2, len(weights)} - {1}):
            line[f"{count} together, s each"] = bench.seconds(partial(together, weights[:count]), 3) / count
        rows.append(line)
    return rows


def suite_checkpoint() -> list[Row]:
    """``loftq-init`` on a synthetic checkpoint of Llama-3-8B's shape, disk to disk, and the share of I/O."""
    from qlora_engine import pipeline, solve_ahead
    from qlora_engine.architecture import read_architecture
    from qlora_engine.checkpoint import Checkpoint
    from qlora_engine.options import InitOptions
    from qlora_engine.plan import make_plan

    with tempfile.TemporaryDirectory(prefix="checkpoint-") as scratch:
        source = Path(scratch) / "model"
        began = time.perf_counter()
        size = synthetic_checkpoint(source, bench.SIZES)
        written = time.perf_counter() - began
        checkpoint = Checkpoint.open(source)
        architecture = read_architecture(source, checkpoint.config)
        options = InitOptions(rank=bench.SIZES.solver_rank, iters=5, together=True)
        plan = make_plan(checkpoint, architecture, options)
        began = time.perf_counter()
        for entry in checkpoint.tensors.values():
            entry.read()
        read = time.perf_counter() - began
        device = torch.device(bench.device(), 0) if bench.device() == "cuda" else torch.device("cpu")
        solved: dict[int, float] = {}
        for window in (1 << 28, 1 << 30):  # weights that are solved together; the first is the default
            began = time.perf_counter()
            count = sum(1 for _ in solve_ahead.solve_ahead(plan, plan.layers, device, weights=window))
            synchronize()
            solved[window] = time.perf_counter() - began
        began = time.perf_counter()
        report = pipeline.run(plan, Path(scratch) / "out", device=device)
        total = time.perf_counter() - began
        out_bytes = sum(path.stat().st_size for path in (Path(scratch) / "out").rglob("*") if path.is_file())
    return [
        {
            "suite": "checkpoint",
            "what": f"{count} matrices, rank {options.rank}, 5 iterations",
            "GB in": size / 1e9,
            "GB out": out_bytes / 1e9,
            "disk to disk s": total,
            **{f"read and solve 2^{w.bit_length() - 1} weights at once, s": s for w, s in solved.items()},
            "share of writing": 1 - solved[1 << 28] / total,
            "read alone s": read,
            "write the model alone s": written,
            "worst error": max(layer.error for layer in report.layers),
        }
    ]


def suite_recipe() -> list[Row]:
    """The calibrated recipe with one round, rank 16, NF4; Llama-3-8B's time from two of its layers."""
    from qlora_engine.architecture import read_architecture
    from qlora_engine.calibration import calibrate
    from qlora_engine.checkpoint import Checkpoint
    from qlora_engine.options import InitOptions
    from qlora_engine.plan import make_plan
    from qlora_engine.solve import SolvedLayer, solve_layer

    tiny = bench.SIZES is bench.TINY
    small = replace(bench.SIZES, hidden=576, width=1536, kv=192, head=64, layers=30, vocabulary=2048)
    large = replace(bench.SIZES, layers=2, vocabulary=2048)
    models = {"SmolLM2-135M": (small, 30), "Llama-3-8B": (large, 32)}
    if tiny:
        models = {"tiny": (bench.SIZES, bench.SIZES.layers)}
    device = torch.device(bench.device(), 0) if bench.device() == "cuda" else torch.device("cpu")
    rows: list[Row] = []
    for name, (sizes, layers) in models.items():
        with tempfile.TemporaryDirectory(prefix="recipe-") as scratch:
            source = Path(scratch) / "model"
            synthetic_checkpoint(source, sizes)
            checkpoint = Checkpoint.open(source)
            architecture = read_architecture(source, checkpoint.config)
            rank = 4 if tiny else bench.RANK
            options = InitOptions(method="recipe-fast", scales="signed-mse", rank=rank)
            plan = make_plan(checkpoint, architecture, options)
            generator = torch.Generator().manual_seed(0)
            length = 64 if tiny else 1024
            windows = [torch.randint(sizes.vocabulary, (length,), generator=generator) for _ in range(16)]
            calibration = calibrate(source, windows, [layer.path for layer in plan.layers], device=device)
            for attempt in ("first", "again"):
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                synchronize()
                began = time.perf_counter()
                by_shape: dict[str, list[SolvedLayer]] = {}
                for layer in plan.layers:
                    solved = solve_layer(plan, layer, layer.entry.read(), device, calibration)
                    by_shape.setdefault("x".join(map(str, solved.report.shape)), []).append(solved)
                synchronize()
                took = time.perf_counter() - began
                line: Row = {
                    "suite": "recipe",
                    "what": name,
                    "run": attempt,
                    "solved": len(plan.layers),
                    "s": took,
                }
                line["whole model s"] = took * layers / sizes.layers
                if device.type == "cuda":
                    line["MiB"] = round(torch.cuda.max_memory_allocated() / 2**20)
                means = {shape: sum(s.report.seconds for s in of) / len(of) for shape, of in by_shape.items()}
                line["ms by shape"] = ", ".join(f"{shape} {mean * 1e3:.0f}" for shape, mean in means.items())
                rows.append(line)
    return rows


def synthetic_checkpoint(folder: Path, sizes: bench.Sizes) -> int:
    """A Llama of these sizes with random bf16 weights, a shard a layer; bytes written."""
    from safetensors.torch import save_file

    hidden, width, kv, vocabulary = sizes.hidden, sizes.width, sizes.kv, sizes.vocabulary
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": hidden // sizes.head,
        "num_key_value_heads": kv // sizes.head,
        "head_dim": sizes.head,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    projections = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (width, hidden),
        "mlp.up_proj": (width, hidden),
        "mlp.down_proj": (hidden, width),
    }
    weight_map: dict[str, str] = {}
    total = 0

    def random(shape: tuple[int, ...]) -> Tensor:
        # drawn on the device: a CPU needs minutes for 8e9 normal numbers
        return (torch.randn(shape, device=bench.device()) * 0.02).to(torch.bfloat16).cpu()

    def save(name: str, tensors: dict[str, Tensor]) -> None:
        nonlocal total
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())

    for layer in range(sizes.layers):
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}{name}.weight": random(shape) for name, shape in projections.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        save(f"model-{layer + 1:05d}-of-{sizes.layers + 1:05d}.safetensors", tensors)
    rest = {
        "model.embed_tokens.weight": random((vocabulary, hidden)),
        "lm_head.weight": random((vocabulary, hidden)),
    }
    rest["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    save(f"model-{sizes.layers + 1:05d}-of-{sizes.layers + 1:05d}.safetensors", rest)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def suite_solver() -> list[Row]:
    """LoftQ, rank 64, 5 iterations, against exact SVDs and PEFT's algorithm."""
    from qlora_engine import inits

    rows = []
    for shape in bench.SIZES.solver_shapes:
        weight = torch.randn(shape, device=bench.device())
        case = "x".join(map(str, shape))

        def solve(svd: str, weight: Tensor = weight) -> Any:
            return inits.initialise(
                weight,
                method="loftq",
                spec=QuantSpec(),
                rank=bench.SIZES.solver_rank,
                iters=5,
                scales="absmax",
                svd=svd,
            )

        error = {svd: float(solve(svd).error) for svd in ("fast", "exact")}
        taken = {svd: bench.seconds(lambda svd=svd: solve(svd), 5 if svd == "fast" else 1) for svd in error}
        peft = None
        if bench.peer("peft") and bench.peer("bitsandbytes"):
            from peft.utils.loftq_utils import loftq_init

            peft = bench.seconds(
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
