"""The initialisations beside PEFT's own, on small layers. Where PEFT ignores the scaling, ours differs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_engine import inits
from qlora_engine.inits import initialise
from quant import QuantizedTensor, QuantSpec

peft = pytest.importorskip("peft")

OUT, IN, RANK = 48, 64, 8


def layer_of(
    init: bool | str, *, alpha: int = RANK, use_rslora: bool = False, rank: int = RANK
) -> tuple[Any, Tensor]:
    """A PEFT LoRA layer on a Linear, and the weight the Linear had."""
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT)
    weight = linear.weight.detach().clone()
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=["0"], init_lora_weights=init, use_rslora=use_rslora
    )
    model = peft.get_peft_model(nn.Sequential(linear), config)
    return model.base_model.model[0], weight


def peft_parts(layer: Any) -> tuple[Tensor, Tensor, Tensor, float]:
    A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    return layer.base_layer.weight.detach(), A, B, layer.scaling["default"]


@pytest.mark.parametrize(
    ("alpha", "use_rslora"), [(RANK, False), (4 * RANK, False), (RANK, True), (3, False)]
)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_effective_weights_equal(init: str, alpha: int, use_rslora: bool) -> None:
    layer, weight = layer_of(init, alpha=alpha, use_rslora=use_rslora)
    base, A, B, scaling = peft_parts(layer)
    ours = initialise(weight, method=init, rank=RANK, scaling=scaling, svd="exact")
    assert isinstance(ours.base, Tensor)
    torch.testing.assert_close(
        ours.base + scaling * ours.B @ ours.A, base + scaling * B @ A, rtol=0, atol=1e-6
    )
    if init == "pissa":  # PEFT divides, too
        torch.testing.assert_close(ours.base, base, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.B @ ours.A, B @ A, rtol=0, atol=1e-6)
    elif scaling == 1:  # PEFT's OLoRA takes scaling * Q R out of the base instead of Q R
        torch.testing.assert_close(ours.base, base, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.A, A, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.B, B, rtol=0, atol=1e-6)
    else:
        assert not torch.allclose(ours.base, base, atol=1e-3)


def test_pissa_niter_leaves_no_more_than_pefts() -> None:
    layer, weight = layer_of("pissa_niter_4")
    base, *_ = peft_parts(layer)
    ours = initialise(weight, method="pissa_niter_4", rank=RANK)
    assert isinstance(ours.base, Tensor)
    assert float(ours.base.norm()) <= 1.0001 * float(base.norm())


@pytest.mark.parametrize("alpha", [RANK, 2 * RANK])
def test_orthogonal_draws_the_same_factors(alpha: int) -> None:
    layer, weight = layer_of("orthogonal", alpha=alpha)
    torch.manual_seed(7)
    layer.orthogonal_init("default")
    _, A, B, scaling = peft_parts(layer)
    ours = initialise(weight, method="orthogonal", rank=RANK, scaling=scaling, seed=7)
    torch.testing.assert_close(ours.A, A, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.B, B, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("init", "method"), [(True, "default"), ("gaussian", "gaussian"), (False, "random")])
def test_random_starts_have_pefts_distribution(init: bool | str, method: str) -> None:
    theirs_A, theirs_B, ours_A, ours_B = [], [], [], []
    for seed in range(20):
        layer, weight = layer_of(init, rank=16)
        torch.manual_seed(seed)
        layer.lora_A["default"].reset_parameters()
        layer.lora_B["default"].reset_parameters()
        layer.reset_lora_parameters("default", init)
        _, A, B, _ = peft_parts(layer)
        theirs_A.append(A.clone())
        theirs_B.append(B.clone())
        ours = initialise(weight, method=method, rank=16, seed=seed)
        ours_A.append(ours.A)
        ours_B.append(ours.B)
    for theirs, ours in ((theirs_A, ours_A), (theirs_B, ours_B)):
        a, b = torch.stack(theirs).flatten().sort().values, torch.stack(ours).flatten().sort().values
        # Sorted samples of one distribution lie close: 20 x 1024 and 20 x 768 of them, to 2 % of the range.
        assert float((a - b).abs().mean()) <= 0.02 * max(float(a.abs().max()), 1e-9) + 1e-12


def test_default_draws_the_same_numbers_from_the_global_generator() -> None:
    """seed=None is PEFT's way: what torch.manual_seed says. nn.init draws the same uniform numbers."""
    layer, weight = layer_of(True)
    torch.manual_seed(3)
    layer.reset_lora_parameters("default", True)
    torch.manual_seed(3)
    ours = initialise(weight, method="default", rank=RANK, seed=None)
    torch.testing.assert_close(ours.A, layer.lora_A["default"].weight.detach(), rtol=0, atol=1e-7)


def test_eva_spans_the_same_directions() -> None:
    from peft.utils.incremental_pca import IncrementalPCA

    torch.manual_seed(0)
    X = torch.randn(400, IN) * torch.logspace(0.5, -2, IN) + 0.2
    pca = IncrementalPCA(n_components=RANK, lowrank=True, lowrank_seed=42, lowrank_niter=20)
    pca.partial_fit(X.clone())  # all at once: several batches would truncate in between
    hessian, mean, tokens = inits.moments(X)
    weight = torch.randn(OUT, IN)
    given = {"hessian": hessian, "mean": mean, "tokens": tokens}
    ours = initialise(weight, method="eva", rank=RANK, **given)
    torch.testing.assert_close(ours.A, pca.components_.float(), rtol=0, atol=2e-3)
    whitened = initialise(weight, method="eva", rank=RANK, whiten=True, **given)
    expected = pca.components_ / pca.singular_values_.sqrt().reshape(-1, 1)
    torch.testing.assert_close(whitened.A, expected.float(), rtol=0, atol=2e-3)


@pytest.fixture(scope="module")
def peft_loftq() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """PEFT's loftq_init as it is, with the name of its hard-coded device replaced."""
    pytest.importorskip("bitsandbytes")
    from peft.utils import loftq_utils

    source = inspect.getsource(inspect.unwrap(loftq_utils.loftq_init))
    assert source.count('"cuda"') == 1
    namespace = dict(vars(loftq_utils))
    exec(source.replace('"cuda"', '"cpu"'), namespace)
    return namespace["loftq_init"]


@pytest.mark.parametrize("iters", [1, 5])
def test_loftq_equals_pefts_at_scaling_one(
    iters: int, peft_loftq: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> None:
    W = torch.randn(256, 192)
    Q, A, B = peft_loftq(W, num_bits=4, reduced_rank=16, num_iter=iters)
    ours = initialise(W, method="loftq", rank=16, spec=QuantSpec("nf4"), iters=iters, svd="exact")
    theirs = float((W - Q - B @ A).norm() / W.norm())
    assert ours.error == pytest.approx(theirs, rel=1e-4)
    assert isinstance(ours.base, QuantizedTensor)
    if iters == 1:
        assert torch.equal(ours.base.dequantize(), Q)
        torch.testing.assert_close(ours.B @ ours.A, B @ A, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scaling", [0.5, 2.0, 4.0])
def test_loftq_of_peft_loses_at_other_scalings(
    scaling: float, peft_loftq: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> None:
    W = torch.randn(256, 256)
    Q, A, B = peft_loftq(W, num_bits=4, reduced_rank=16, num_iter=5)
    theirs = float((W - Q - scaling * B @ A).norm() / W.norm())
    ours = initialise(W, method="loftq", rank=16, spec=QuantSpec("nf4"), scaling=scaling)
    assert ours.error < 0.97 * theirs
