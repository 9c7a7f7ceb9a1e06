"""Layers solved together against layers solved alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_engine import inits, pipeline, solve_ahead
from qlora_engine.architecture import read_architecture
from qlora_engine.checkpoint import Checkpoint
from qlora_engine.errors import InputError
from qlora_engine.inits import Initialised, initialise, initialise_many
from qlora_engine.inits.loftq import _chosen, solve_many
from qlora_engine.options import InitOptions
from qlora_engine.plan import Plan, make_plan
from qlora_engine.solve import SolvedLayer, solve_layer
from quant import QuantizedTensor, QuantSpec

CPU = torch.device("cpu")


def close(many: Sequence[Initialised], alone: Sequence[Initialised]) -> None:
    """Equal up to rounding: the same errors to 1e-4, the same codes but for a few near a threshold."""
    for a, b in zip(many, alone, strict=True):
        assert a.best == b.best
        assert a.error == pytest.approx(b.error, rel=1e-4)
        assert a.error_plain == pytest.approx(b.error_plain, rel=1e-6)
        assert a.trace == pytest.approx(b.trace, rel=1e-4)
        assert isinstance(a.base, QuantizedTensor)
        assert isinstance(b.base, QuantizedTensor)
        different = (a.base.unpacked_codes() != b.base.unpacked_codes()).float().mean()
        assert different < 0.005
        torch.testing.assert_close(a.base.dense_scales(), b.base.dense_scales(), rtol=0.05, atol=1e-6)
        assert a.A.untyped_storage().nbytes() == a.A.nbytes  # not a view that keeps the batch alive


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (QuantSpec("nf4", 64), {}),
        (QuantSpec("nf4", 64, True), {"start": "svd"}),
        (QuantSpec("int3", 32), {"scales": "signed-mse"}),
        (QuantSpec("uint2", 32), {"svd": "exact", "iters": 1}),
    ],
    ids=str,
)
def test_many_are_solved_as_each_alone(spec: QuantSpec, options: dict[str, Any]) -> None:
    weights = [torch.randn(160, 96) * 2.0**i for i in range(3)]
    settings = {"method": "loftq", "rank": 8, "spec": spec, "iters": 4, "scaling": 0.5, **options}
    many = initialise_many(weights, ["a", "b", None], **settings)
    close(many, [initialise(w, name=n, **settings) for w, n in zip(weights, ["a", "b", None], strict=True)])
    for got, weight in zip(many, weights, strict=True):
        assert isinstance(got.base, QuantizedTensor)
        left = weight - got.base.dequantize() - 0.5 * got.B @ got.A
        assert float(left.norm() / weight.norm()) == pytest.approx(got.error, rel=1e-5)


def test_wide_and_with_nothing_to_correct() -> None:
    exact = torch.randint(-7, 8, (96, 256)).float()
    exact[:, ::32] = 7.0
    weights = [torch.randn(96, 256), exact, torch.zeros(96, 256), torch.randn(96, 256)]
    spec = QuantSpec("int4", 32)
    settings = {"method": "loftq", "rank": 6, "spec": spec, "iters": 3}
    many = initialise_many(weights[:2] + weights[3:], [None] * 3, **settings)
    assert many[1].best == 0
    assert not many[1].B.any()
    close(many, [initialise(w, **settings) for w in weights[:2] + weights[3:]])
    # a zero matrix is left to the way that looks: float32 has no room for its squares
    many = initialise_many(weights, [None] * 4, **settings)
    assert many[2].error == 0


def test_other_methods_and_bad_weights() -> None:
    weights = [torch.randn(64, 64), torch.randn(64, 64)]
    alone = [initialise(w, method="qlora", rank=4, spec=QuantSpec(), name="x") for w in weights]
    for a, b in zip(
        initialise_many(weights, ["x", "x"], method="qlora", rank=4, spec=QuantSpec()), alone, strict=True
    ):
        assert torch.equal(a.A, b.A)
        assert a.error == b.error
    weights[1][3, 3] = float("nan")
    with pytest.raises(InputError, match=r"'second'.*1 elements"):
        initialise_many(weights, ["first", "second"], method="loftq", rank=4, spec=QuantSpec())
    with pytest.raises(ValueError, match="one shape"):
        initialise_many([weights[0], torch.randn(64, 32)], [None] * 2, method="loftq", rank=4)


@pytest.mark.parametrize(
    ("trace", "best", "length"),
    [
        ([0.5, 0.4, 0.3, 0.2], 3, 4),
        ([0.5, 0.4, 0.45, 0.2], 1, 3),  # it rose: there the alternation ends
        ([0.5, 0.4, 0.3, 0.3], 2, 4),  # equal is not risen
        ([0.5, 0.6, 0.7], 0, 3),
        ([0.5, 0.5], 0, 2),
    ],
)
def test_the_iterate_that_is_kept(trace: list[float], best: int, length: int) -> None:
    assert _chosen(list(trace)) == (best, tuple(trace[:length]))


class Reads(TorchDispatchMode):
    """Counts the operators that make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select")
        self.count += func.__name__.split(".")[0] in waits
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("spec", [QuantSpec("nf4"), QuantSpec("nf4", 64, True)], ids=str)
def test_nothing_waits_within_the_alternation(spec: QuantSpec) -> None:
    requests = [inits.InitRequest(8, spec, iters=5) for _ in range(2)]
    with Reads() as reads:
        solve_many(torch.randn(2, 160, 96), requests)
    assert reads.count == 0
    with Reads() as reads:  # the counter counts
        initialise(torch.randn(160, 96), method="loftq", rank=8, spec=spec)
    assert reads.count > 5


@pytest.fixture(scope="module")
def plan(make_checkpoint: Callable[..., Path]) -> Plan:
    checkpoint = Checkpoint.open(make_checkpoint("llama"))
    options = InitOptions(rank=4, iters=2)
    return make_plan(checkpoint, read_architecture(checkpoint.folder, checkpoint.config), options)


@pytest.fixture(scope="module")
def alone(plan: Plan) -> list[SolvedLayer]:
    return [solve_layer(plan, layer, layer.entry.read(), CPU) for layer in plan.layers]


@pytest.mark.parametrize("weights", [None, 64 * 64 * 4, 1])
def test_windows_give_every_layer_in_order(
    plan: Plan, alone: list[SolvedLayer], weights: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    real = solve_ahead.solve_group

    def counted(
        plan: Plan, layers: Any, weights: Sequence[Tensor], device: torch.device
    ) -> list[SolvedLayer]:
        sizes.append(len(layers))
        return real(plan, layers, weights, device)

    monkeypatch.setattr(solve_ahead, "solve_group", counted)
    found = list(solve_ahead.solve_ahead(plan, plan.layers, CPU, weights=weights))
    assert [one.report.name for one in found] == [layer.path for layer in plan.layers]
    for want, one in zip(alone, found, strict=True):
        assert one.report.error == pytest.approx(want.report.error, rel=1e-4)
        assert one.report.weight_norm == want.report.weight_norm
        assert [t.name for t in one.base] == [t.name for t in want.base]
        assert [t.name for t in one.factors] == [t.name for t in want.factors]
        assert one.report.seconds > 0
    # of two layers: down; q and o, k and v, gate and up
    assert sorted(sizes) == {None: [2, 4, 4, 4], 64 * 64 * 4: sorted(sizes), 1: []}[weights]
    assert weights != 64 * 64 * 4 or 2 in sizes


def test_layers_are_solved_one_by_one_unless_asked(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that bytes depend neither on free memory nor on where a run was interrupted."""
    called: list[int] = []

    def counted(plan: Plan, layers: Sequence[Any], device: torch.device) -> Iterator[Any]:
        called.append(len(layers))
        return iter(layers)

    monkeypatch.setattr(pipeline, "solve_ahead", counted)
    assert next(pipeline._solve(plan, list(plan.layers[:1]), CPU, None)).report.name == plan.layers[0].path
    assert not called
    asked = replace(plan, options=replace(plan.options, together=True))
    assert list(pipeline._solve(asked, list(plan.layers), CPU, None)) == list(plan.layers)
    assert called == [len(plan.layers)]
