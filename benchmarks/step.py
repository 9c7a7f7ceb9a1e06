"""A training step of Llama-3-8B's dimensions: tokens a second and peak memory, beside PEFT + bitsandbytes.

    python -m benchmarks.step --json step.json            # 8 layers, batch 1 and 4, 2048 tokens
    python -m benchmarks.step --full --json full.json     # 32 layers with offload, 2048 and 8192 tokens
    python -m benchmarks.step --tiny                      # small on a CPU: does it run at all

Random weights, the same for all, NF4 with nested scales, rank 16 on every Linear but the head, AdamW.
"recipe" is PEFT as tutorials have it: prepare_model_for_kbit_training, which makes what is not quantised
float32, and autocast. "tuned" leaves everything in bfloat16, the factors too. Ours has float32 factors under
autocast, as qlora-finetune has; "norms apart" leaves RMSNorms and rotary embeddings as transformers has them;
"graphs" replays the layers from CUDA graphs. "auto" checkpoints as few layers as fit into the peak memory
that tuned took with all of its layers checkpointed. Nothing is reported unless the losses before the first
step agree.
--rows N lays N texts of equal length into every sequence: peers get positions that restart, ours what
qlora-finetune gives it; "one mask" has ours take a mask where it would be told where rows begin.
--profile prints what a step's kernels take, by name, of every variant, to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import save, table
from quant.linear import QuantLinear
from quant.spec import QuantSpec
from quant.tensor import quantize

SPEC = QuantSpec("nf4", 64, True)
AGREE = 0.02  # nats: nested scales are rounded otherwise by bitsandbytes, and the dtypes differ
VARIANTS = (
    *("recipe", "tuned", "ours", "ours, norms apart", "ours, graphs", "ours, graphs, norms apart"),
    *("ours, one mask", "ours, graphs, one mask"),
)
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What is measured: the model's dimensions and those of a step."""

    layers: int = 8
    hidden: int = 4096
    width: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256
    length: int = 2048
    rank: int = 16
    rows: int = 1  # that share a sequence
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16


TINY = Case(2, 128, 256, 4, 2, 512, 64, 4, device="cpu", dtype=torch.float32)


def skeleton(case: Case, make: Callable[[Tensor], nn.Module]) -> Any:
    """A LlamaForCausalLM whose decoder Linears are what ``make`` makes of random weights (out, in).

    Dense weights exist one at a time; embedding, head and norms are of ``case.dtype``.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.width,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        max_position_embeddings=max(8192, case.length),
        rope_theta=500000.0,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(case.device)
    for index, (name, module) in enumerate(list(model.named_modules())):
        generator = torch.Generator(device=case.device).manual_seed(index)
        if isinstance(module, (nn.Linear, nn.Embedding)):
            weight = torch.empty(module.weight.shape, dtype=case.dtype, device=case.device)
            weight.normal_(0.0, 0.02, generator=generator)
            if ".layers." in name:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, make(weight))
            else:
                module.weight = nn.Parameter(weight, requires_grad=False)
        elif "norm" in name:
            ones = torch.ones(case.hidden, dtype=case.dtype, device=case.device)
            module.weight = nn.Parameter(ones, requires_grad=False)
    return model.requires_grad_(False)


def factors(model: Any) -> None:
    """The same small factors in every variant, so that gradients reach both of them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.002)


def lora(case: Case) -> dict[str, Any]:
    """The adapter, as LoraConfig's arguments."""
    return {
        "r": case.rank,
        "lora_alpha": case.rank,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }


def ours(
    case: Case,
    recomputed: int,
    offload: tuple[str, ...] = (),
    *,
    replayed: bool = False,
    norms: bool = True,
    one_mask: bool = False,
    loss: str = "auto",
) -> Any:
    """This project's layers, as qlora-finetune sets them up, which fuses the ``norms``."""
    from qlora_engine import LoraConfig, fused_blocks, get_peft_model
    from qlora_engine.training import graphs, host, recompute
    from qlora_engine.training.loss import use_chunked_loss

    base = skeleton(case, lambda weight: QuantLinear.from_quantized(quantize(weight, SPEC)))
    if "embedding" in offload:
        host.embedding_to_host(base)
    model = get_peft_model(base, LoraConfig(**lora(case)))
    factors(model)
    model.train()
    if not use_chunked_loss(model, loss):
        raise SystemExit("the chunked loss is not in use: this would measure something else")
    if one_mask:
        base.config._attn_implementation = "sdpa"
    recompute.apply(model, recomputed)
    if recomputed:
        base.enable_input_require_grads()
        if "activations" in offload:
            host.activations_to_host(model)
    if case.device == "cuda":
        fused_blocks.enable(model, norms=norms)
    if replayed:
        graphs.enable(model, "on")
    return model


def peft(case: Case, recomputed: int, *, recipe: bool) -> Any:
    """PEFT's layers on bitsandbytes' Linear4bit."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    def make(weight: Tensor) -> nn.Module:
        rows, columns = weight.shape
        layer = bnb.nn.Linear4bit(
            columns, rows, bias=False, compute_dtype=case.dtype, compress_statistics=True, quant_type="nf4"
        )
        layer.weight = bnb.nn.Params4bit(
            weight.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
        return layer.to(case.device)

    base = skeleton(case, make)
    base.is_loaded_in_4bit = True  # PEFT picks its bitsandbytes layer by this
    if recipe:
        base = prepare_model_for_kbit_training(
            base,
            use_gradient_checkpointing=recomputed > 0,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    elif recomputed:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    model = get_peft_model(base, LoraConfig(**lora(case)), autocast_adapter_dtype=recipe)
    layer = base.model.layers[0].self_attn.q_proj
    if type(layer).__name__ != "Linear4bit":
        raise SystemExit(f"PEFT made a {type(layer).__name__}: the baseline would be another layer")
    factors(model)
    return model.train()


def measure(
    case: Case, model: Any, batch: int, *, autocast: bool, repeats: int, profiled: str | None = None
) -> Row:
    """Median milliseconds of a step after three unmeasured ones, tokens a second, peak MiB on a GPU.

    ``profiled`` is the heading over the kernels of one step more, printed to stderr; None: no such step.
    """
    on_gpu = case.device == "cuda"
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(case.vocabulary, (batch, case.length), generator=generator).to(case.device)
    inputs = {"input_ids": ids, "labels": ids} | packed(case, model, batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=on_gpu)
    half = torch.autocast(case.device, dtype=torch.bfloat16) if autocast and on_gpu else None
    first: float | None = None
    times: list[float] = []

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with half or contextlib.nullcontext():
            loss: Tensor = model(**inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    for turn in range(3 + repeats):
        if on_gpu:
            torch.cuda.synchronize()
            if turn == 0:
                torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        loss = step()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        first = float(loss) if first is None else first
    seconds = statistics.median(times[3:])
    found = {
        "ms": seconds * 1e3,
        "tok/s": batch * case.length / seconds,
        "peak MiB": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None,
        "reserved MiB": torch.cuda.max_memory_reserved() / 2**20 if on_gpu else None,
        "first loss": first,
    }
    if profiled is not None:
        kernels(step, profiled)
    return found


def packed(case: Case, model: Any, batch: int) -> dict[str, Tensor]:
    """What keeps the rows of a sequence apart, as this model takes it."""
    from qlora_engine.training.packed_rows import attends_by_beginnings, row_beginnings

    if case.rows == 1:
        return {}
    each = -(-case.length // case.rows)
    positions = (torch.arange(case.length) % each).expand(batch, -1)
    found = {"position_ids": positions}
    if attends_by_beginnings(model.get_base_model()):
        found["row_beginnings"] = row_beginnings(positions, batch * (case.rows + 1))
    return {name: tensor.to(case.device) for name, tensor in found.items()}


def kernels(step: Callable[[], Tensor], heading: str, most: int = 30) -> None:
    """Print what one ``step`` takes, by kernel on a GPU and by operator on a CPU, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = [event for event in profiler.key_averages() if getattr(event, field) > 0]
    events.sort(key=lambda event: -float(getattr(event, field)))
    total = sum(float(getattr(event, field)) for event in events) / 1e3
    count = sum(int(event.count) for event in events)
    print(f"\n{heading}: {total:.1f} ms in {count} calls", file=sys.stderr)
    for event in events[:most]:
        line = f"{float(getattr(event, field)) / 1e3:9.3f} ms {event.count:6d}  {event.key[:140]}"
        print(line, file=sys.stderr)
    rest = sum(float(getattr(event, field)) for event in events[most:]) / 1e3
    print(f"{rest:9.3f} ms in the other {max(0, len(events) - most)}", file=sys.stderr, flush=True)


def forget() -> None:
    """Let go of the last model, and of what libraries and our layers keep for the next one."""
    from quant.linear_op import forget_workspaces

    for _ in range(2):  # what the first pass frees may hold more
        gc.collect()
    if torch.cuda.is_available():
        forget_workspaces(torch.device("cuda", torch.cuda.current_device()))
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        _warn_of_what_is_left()


def _warn_of_what_is_left(allowed: int = 64) -> None:
    """Tell what is still on the GPU: it would be counted in the next variant's peak."""
    left = torch.cuda.memory_allocated() / 2**20
    if left <= allowed:
        return
    print(f"{left:.0f} MiB were not freed, and are part of the next peak:", file=sys.stderr)
    # by type: a proxy of something dead answers isinstance with an error
    found = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.is_cuda]
    for tensor in sorted(found, key=lambda t: -t.untyped_storage().nbytes())[:12]:
        users = ", ".join(sorted({type(user).__name__ for user in gc.get_referrers(tensor)}))
        size = tensor.untyped_storage().nbytes() / 2**20
        print(f"{size:9.1f} MiB {tuple(tensor.shape)} {tensor.dtype}, held by {users}", file=sys.stderr)


def compare(
    case: Case,
    batches: list[int],
    variants: list[str],
    repeats: int,
    *,
    profiled: bool = False,
    loss: str = "auto",
) -> list[Row]:
    """Every variant at every batch, all layers checkpointed or none; then ours at tuned's memory."""
    from qlora_engine.training import recompute
    from qlora_engine.training.loss import use_chunked_loss

    rows: list[Row] = []
    for batch in batches:
        for recomputed in (case.layers, 0):
            makers: dict[str, Callable[[], Any]] = {
                "recipe": lambda n=recomputed: peft(case, n, recipe=True),
                "tuned": lambda n=recomputed: peft(case, n, recipe=False),
            }
            for name in (name for name in VARIANTS if name.startswith("ours")):
                options: dict[str, Any] = {
                    "replayed": "graphs" in name,
                    "norms": "apart" not in name,
                    "one_mask": "mask" in name,
                    "loss": loss,
                }
                makers[name] = functools.partial(ours, case, recomputed, **options)
            here: dict[str, Row] = {}
            for name in variants:
                if case.device == "cpu" and "graphs" in name:
                    continue
                model = makers[name]()
                heading = f"{name}, batch {batch}, {recomputed} of {case.layers} layers checkpointed"
                found = measure(
                    case,
                    model,
                    batch,
                    autocast=name != "tuned",
                    repeats=repeats,
                    profiled=heading if profiled else None,
                )
                del model
                forget()
                what = {"what": name, "checkpointing": "on" if recomputed else "off", "batch": batch}
                here[name] = what | found
                rows.append(here[name])
                print(here[name], file=sys.stderr, flush=True)
            _agree(here)
            for peer in ("recipe", "tuned"):
                for name in (name for name in here if name.startswith("ours") and peer in here):
                    here[name][f"tok/s x {peer}"] = here[name]["tok/s"] / here[peer]["tok/s"]
                    if case.device == "cuda":
                        here[name][f"MiB x {peer}"] = here[name]["peak MiB"] / here[peer]["peak MiB"]
            if recomputed and case.device == "cuda" and "tuned" in here and "ours" in here:
                available = int(here["tuned"]["peak MiB"] * 2**20)
                model = ours(case, 0, loss=loss)
                plan = recompute.plan(
                    model,
                    batch_size=batch,
                    length=case.length,
                    recompute="auto",
                    available=available,
                    loss_function=use_chunked_loss(model, loss),
                )
                del model
                forget()
                model = ours(case, plan.recomputed, replayed="ours, graphs" in here, loss=loss)
                found = measure(case, model, batch, autocast=True, repeats=repeats)
                del model
                forget()
                count = f"{plan.recomputed} of {plan.layers}"
                found |= {"planned MiB": plan.total / 2**20, "MiB allowed": available / 2**20}
                found["tok/s x tuned"] = found["tok/s"] / here["tuned"]["tok/s"]
                rows.append({"what": "ours, auto", "checkpointing": count, "batch": batch} | found)
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _agree(rows: dict[str, Row]) -> None:
    losses = [row["first loss"] for row in rows.values()]
    if max(losses) - min(losses) > AGREE:
        raise SystemExit(f"the variants' losses differ, one of them computes something else: {rows}")


def full(case: Case, lengths: list[int], repeats: int) -> list[Row]:
    """All layers checkpointed, embedding and layer inputs on the host, batch 1."""
    rows = []
    for length in lengths:
        for offload in ((), ("embedding",), ("embedding", "activations")):
            here = replace(case, length=length)
            model = ours(here, here.layers, offload)
            found = measure(here, model, 1, autocast=True, repeats=repeats)
            del model
            forget()
            what = {"what": "ours", "layers": here.layers, "tokens": length}
            rows.append(what | {"offload": " ".join(offload) or "none"} | found)
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure what is asked for, print tables, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="32 layers with offload, no peers")
    parser.add_argument("--tiny", action="store_true", help="small dimensions on the CPU, to try the code")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument(
        "--rows", type=int, default=1, help="that share a sequence, kept apart; not with --full"
    )
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of a sequence, with --full")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["recipe", "tuned", "ours", "ours, graphs"],
        help=f"of {', '.join(map(repr, VARIANTS))}",
    )
    parser.add_argument(
        "--loss", choices=("auto", "liger", "chunked"), default="auto", help="ours, as qlora-finetune's"
    )
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step to stderr")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    if not arguments.tiny and not torch.cuda.is_available():
        print("needs a CUDA GPU; --tiny tries the code on a CPU", file=sys.stderr)
        return 2
    if unknown := set(arguments.variants) - set(VARIANTS):
        allowed = ", ".join(map(repr, VARIANTS))
        print(f"--variants {' '.join(sorted(unknown))}; allowed: {allowed}", file=sys.stderr)
        return 2
    case = TINY if arguments.tiny else Case(layers=32 if arguments.full else 8)
    case = replace(case, rows=1 if arguments.full else arguments.rows)
    if arguments.full:
        lengths = arguments.lengths or ([64, 128] if arguments.tiny else [2048, 8192])
        rows = full(case, lengths, arguments.repeats)
    else:
        rows = compare(
            case,
            arguments.batches,
            arguments.variants,
            arguments.repeats,
            profiled=arguments.profile,
            loss=arguments.loss,
        )
    print(table(rows))
    if arguments.json:
        save(arguments.json, command=["python", "-m", "benchmarks.step", *(argv or sys.argv[1:])], rows=rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
