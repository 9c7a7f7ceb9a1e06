"""What each step of the calibrated recipe is worth, on layers of an encoder with true float32 weights.

    python -m benchmarks.recipe_layers --calibration-text wiki.valid.txt --text wiki.test.txt
    python -m benchmarks.recipe_layers --layers all --rows methods      with embeddings of held-out sentences

all-MiniLM-L6-v2, calibrated on 512 sentences. "layer error" is the geometric mean over Linears of the
relative output error on held-out sentences, sqrt(tr(E H E^T) / tr(W H W^T)), "calibrated" the same on the
sentences that calibration saw. ``times`` is LoftQ's error with one iteration at the same width over the
row's. Without files, halves of Python's own documentation serve. The rows of ``steps`` add one step after
another, those of ``ablation`` leave one out of the whole or change it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.activations import linears
from benchmarks.common import save, table
from benchmarks.real_models import load, python_topics
from qlora_engine import inits
from qlora_engine.hessian import SecondMoment, energy
from qlora_engine.inits import recipe
from qlora_engine.inits.method import Method
from quant import QuantizedTensor, QuantSpec

ROWS = ("methods", "steps", "ablation")


@dataclass(frozen=True)
class Row:
    """A way to initialise a layer and the options of ``initialise`` that go with it."""

    name: str
    method: str | Method
    iters: int = 1
    scales: str = "absmax"
    damping: float | None = None


@dataclass
class Measured:
    """A row's errors; embeddings only where every layer was replaced."""

    format: str
    method: str
    weight_error: float
    layer_error: float
    calibrated: float
    times: float | None
    embedding_error: float | None
    cosine: float | None
    seconds: float


def rows(kind: str) -> Iterator[Row]:
    """LoftQ with one iteration, to compare with, and then what ``kind`` asks for."""
    yield Row("loftq, 1 iteration", "loftq")
    if kind == "methods":
        yield Row("qlora (B = 0)", "qlora")
        yield Row("loftq, 5 iterations", "loftq", 5)
        yield Row("loftq, 5, scale search", "loftq", 5, "mse")
        yield Row("loftq, 5, signed search", "loftq", 5, "signed-mse")
        yield Row("qpissa, 5, signed search", "qpissa", 5, "signed-mse")
        yield Row("qera-diag", "qera-diag")
        yield Row("qera", "qera")
        yield Row("qera-alternating, 5, signed", "qera-alternating", 5, "signed-mse")
        yield Row("cloq", "cloq")
        yield Row("recipe-fast (T = 1)", "recipe-fast")
        yield Row("recipe (T = 4)", "recipe", 4)
        return
    if kind == "steps":
        yield Row("closed form in H (qera)", "qera")
        yield Row("+ scale search weighted by diag(H)", "qera", scales="mse")
        yield Row("+ signed scales", "qera", scales="signed-mse")
        yield Row("+ GPTQ (cloq)", "cloq", scales="signed-mse")
        yield _scheduled("+ the metric beside A (T = 0)", rounds=0, warm=0)
        yield _scheduled("+ scales refitted, GPTQ again", rounds=0)
        yield _scheduled("+ one plain sweep (T = 1)", rounds=1, again=False, sweeps=0)
        yield _scheduled("+ GPTQ again in the round", rounds=1, sweeps=0)
        yield _scheduled("+ six annealed sweeps: recipe-fast", rounds=1)
        yield _scheduled("T = 2", rounds=2)
        yield _scheduled("T = 4: recipe", rounds=4)
        yield _scheduled("T = 8", rounds=8)
        return
    yield Row("recipe, T = 1", "recipe", 1)
    yield Row("recipe, T = 4", "recipe", 4)
    bare = {"warm": 0, "again": False, "sweeps": 0}
    yield _scheduled("prototype (one plain sweep), T = 1", rounds=1, **bare)
    yield _scheduled("prototype (one plain sweep), T = 4", rounds=4, **bare)
    yield replace(
        _scheduled("prototype, T = 4, positive scales", rounds=4, damping=0.01, **bare), scales="mse"
    )
    yield _scheduled("T = 4 without annealing", rounds=4, sweeps=0)
    yield _scheduled("T = 4 without GPTQ again", rounds=4, warm=0, again=False)
    yield _scheduled("T = 1, 12 sweeps", rounds=1, sweeps=12)
    yield _scheduled("T = 4, 12 sweeps", rounds=4, sweeps=12)
    yield _scheduled("T = 4, temperature 0.2", rounds=4, temperature=0.2)
    yield _scheduled("T = 4, GPTQ damped by 0.01", rounds=4, damping=0.01)
    yield replace(_scheduled("T = 4, H damped by 0.001", rounds=4), damping=0.001)
    yield replace(_scheduled("T = 4, H damped by 0.03", rounds=4), damping=0.03)
    yield replace(_scheduled("T = 4, H damped by 0.1", rounds=4), damping=0.1)


def _scheduled(name: str, **schedule: Any) -> Row:
    def solve(weight: Tensor, request: inits.InitRequest) -> inits.Solution:
        return recipe.run(weight, request, recipe.Schedule(**schedule))

    return Row(name, replace(recipe.METHOD, solve=solve))


def sentences(text: str, count: int) -> list[str]:
    """``count`` sentences of eight words or more, spread evenly over the text."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("=")]
    found = [s.strip() for line in lines for s in line.replace(". ", " . ").split(" . ")]
    found = [s for s in found if len(s.split()) >= 8]
    return found[:: max(1, len(found) // count)][:count]


class Encoder:
    """The model with its tokenizer, and sentences in padded batches."""

    def __init__(self) -> None:
        self.model, self.tokenizer = load("minilm")
        self.linears = {n: m for n, m in linears(self.model).items() if n.startswith("encoder.")}

    def _batches(self, texts: list[str]) -> Iterator[Any]:
        for start in range(0, len(texts), 32):
            yield self.tokenizer(
                texts[start : start + 32], return_tensors="pt", padding=True, truncation=True, max_length=256
            )

    @torch.inference_mode()
    def moments(self, texts: list[str]) -> dict[str, Tensor]:
        """H of every Linear's inputs, padding left out."""
        moments = {name: SecondMoment(module.in_features) for name, module in self.linears.items()}
        mask = torch.empty(0)

        def watch(moment: SecondMoment) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _, inputs: moment.add(inputs[0][mask])

        hooks = [m.register_forward_pre_hook(watch(moments[name])) for name, m in self.linears.items()]
        for batch in self._batches(texts):
            mask = batch["attention_mask"].bool()
            self.model(**batch)
        for hook in hooks:
            hook.remove()
        return {name: moment.mean() for name, moment in moments.items()}

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> Tensor:
        """Mean-pooled unit embeddings, (n, hidden)."""
        parts = []
        for batch in self._batches(texts):
            states = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].float()
            parts.append(nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(parts)


def measure(
    encoder: Encoder,
    row: Row,
    spec: QuantSpec,
    weights: dict[str, Tensor],
    calibration: dict[str, Tensor],
    held_out: dict[str, Tensor],
    texts: list[str] | None,
    rank: int,
) -> Measured:
    """Solve the given layers; with ``texts``, also embed them with what would be stored."""
    logs = {"weight": [], "layer": [], "calibrated": []}  # type: dict[str, list[float]]
    original = None if texts is None else encoder.embed(texts)
    options: dict[str, Any] = {} if row.damping is None else {"damping": row.damping}
    start, measuring = time.perf_counter(), 0.0
    for name, W in weights.items():
        solved = inits.initialise(
            W,
            method=row.method,
            spec=spec,
            rank=rank,
            iters=row.iters,
            scales=row.scales,
            hessian=calibration[name],
            **options,
        )
        began = time.perf_counter()
        assert isinstance(solved.base, QuantizedTensor)
        stored = solved.base.dequantize(torch.float32) + solved.B @ solved.A
        for key, H in (("weight", None), ("layer", held_out[name]), ("calibrated", calibration[name])):
            logs[key].append(0.5 * math.log(energy(W - stored, H) / energy(W, H)))
        encoder.linears[name].weight.data.copy_(stored)
        measuring += time.perf_counter() - began
    seconds = time.perf_counter() - start - measuring
    mean = {key: math.exp(sum(values) / len(values)) for key, values in logs.items()}
    error = cosine = None
    if texts is not None and original is not None:
        now = encoder.embed(texts)
        error = float((now - original).norm() / original.norm())
        cosine = float((now * original).sum(1).mean())
    for name, W in weights.items():
        encoder.linears[name].weight.data.copy_(W)
    return Measured(
        spec.format, row.name, mean["weight"], mean["layer"], mean["calibrated"], None, error, cosine, seconds
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", choices=ROWS, default="methods")
    parser.add_argument("--formats", default="nf4,nf3,nf2")
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", default="1,4", help="encoder layers by number, or all (with embeddings)")
    parser.add_argument("--calibration-text", type=Path)
    parser.add_argument("--text", type=Path, help="held out")
    parser.add_argument("--sentences", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    topics = python_topics()
    texts = [
        topics[: len(topics) // 2]
        if args.calibration_text is None
        else args.calibration_text.read_text("utf8"),
        topics[len(topics) // 2 :] if args.text is None else args.text.read_text("utf8"),
    ]
    encoder = Encoder()
    calibration = encoder.moments(sentences(texts[0], args.sentences))
    unseen = sentences(texts[1], args.sentences // 2)
    held_out = encoder.moments(unseen)
    numbers = None if args.layers == "all" else args.layers.split(",")
    weights = {
        name: module.weight.detach().clone()
        for name, module in encoder.linears.items()
        if numbers is None or name.split(".")[2] in numbers
    }
    if not weights:
        parser.error(f"--layers {args.layers}: the encoder has no such layer")
    done: list[Measured] = []
    command = [
        "python",
        "-m",
        "benchmarks.recipe_layers",
        *(sys.argv[1:] if arguments is None else arguments),
    ]
    for fmt in args.formats.split(","):
        baseline = None
        for row in rows(args.rows):
            spec, embedded = QuantSpec(fmt, args.block_size), unseen[:128] if numbers is None else None
            result = measure(encoder, row, spec, weights, calibration, held_out, embedded, args.rank)
            baseline = result.layer_error if baseline is None else baseline
            result.times = baseline / result.layer_error
            done.append(result)
            if args.json is not None:  # after each row: a long run that is cut off has not measured in vain
                save(args.json, command=command, rows=done)
            print(
                fmt, row.name, f"{result.layer_error:.4f} {result.seconds:.1f} s", file=sys.stderr, flush=True
            )
    print(table([asdict(result) for result in done]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
