"""The LoRA layers: their maths, initialisation, bookkeeping and how they survive what is done to modules."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from qlora_engine.config import LoftQConfig, LoraConfig, PeftWarning
from qlora_engine.dora import DoraCaching
from qlora_engine.lora import create_lora_layer
from quant import QuantSpec, quantize
from quant.linear import QuantEmbedding, QuantLinear

IN, OUT, R = 128, 64, 8


def quant_linear(spec: QuantSpec | None = None) -> QuantLinear:
    return QuantLinear.from_quantized(
        quantize(torch.randn(OUT, IN), spec or QuantSpec()), nn.Parameter(torch.randn(OUT))
    )


def quant_embedding() -> QuantEmbedding:
    return QuantEmbedding.from_quantized(quantize(torch.randn(50, IN), QuantSpec()))


# kind: (base layer, input); every base has in or rows IN or 50.
KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(IN, OUT), lambda: torch.randn(3, 5, IN)),
    "quantised": (quant_linear, lambda: torch.randn(3, 5, IN)),
    "conv1d": (lambda: Conv1D(OUT, IN), lambda: torch.randn(3, 5, IN)),
    "embedding": (lambda: nn.Embedding(50, IN), lambda: torch.randint(0, 50, (3, 5))),
    "quantised embedding": (quant_embedding, lambda: torch.randint(0, 50, (3, 5))),
    "conv1": (lambda: nn.Conv1d(8, 16, 3, stride=2, padding=1, dilation=2), lambda: torch.randn(3, 8, 20)),
    "conv2": (
        lambda: nn.Conv2d(8, 16, 3, padding=1, padding_mode="circular"),
        lambda: torch.randn(3, 8, 6, 6),
    ),
    "conv3": (lambda: nn.Conv3d(2, 4, 2), lambda: torch.randn(3, 2, 4, 4, 4)),
}
# MultiheadAttention and bare Parameters have tests of their own below.


def adapt(base: nn.Module, *names: str, r: int = R, alpha: float = 16, **options: Any) -> Any:
    """A LoRA layer around ``base`` with one adapter of each name (default: one)."""
    config = LoraConfig(fan_in_fan_out=isinstance(base, Conv1D), **options)
    first, *others = names or ("default",)
    layer: Any = create_lora_layer(base, first, config, r=r, lora_alpha=alpha, target_name="path.to.it")
    for name in others:
        layer.update_layer(name, r, lora_alpha=alpha, config=config, target_name="path.to.it")
    return layer.eval()


def with_delta(layer: Any, *names: str) -> nn.Module:
    """The base layer, dense, with the adapters' deltas in its weight."""
    from qlora_engine.base_weight import dense_module, is_quantized

    base = layer.get_base_layer()
    base = dense_module(base) if is_quantized(base) else copy.deepcopy(base)
    for name in names:
        base.weight.data = base.weight.data + layer.get_delta_weight(name).detach()
    return base


@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_base_with_the_delta_in_its_weight(kind: str) -> None:
    make, inputs = KINDS[kind]
    layer, x = adapt(make(), init_lora_weights=False), inputs()
    torch.testing.assert_close(layer(x), with_delta(layer, "default")(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_several_active_adapters_add_up(kind: str) -> None:
    make, inputs = KINDS[kind]
    layer, x = adapt(make(), "one", "two", init_lora_weights=False), inputs()
    assert layer.active_adapters == ["one"]
    layer.set_adapter(["two", "one"])
    torch.testing.assert_close(layer(x), with_delta(layer, "one", "two")(x), rtol=1e-4, atol=1e-4)
    layer.set_adapter([])
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    layer.set_adapter("two")
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert not any(p.requires_grad for p in layer.lora_A.parameters())
    layer.enable_adapters(True)
    assert layer.active_adapters == ["two"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", [True, "gaussian"])
def test_a_fresh_adapter_changes_nothing(kind: str, init: bool | str) -> None:
    make, inputs = KINDS[kind]
    for dora in (False, True):
        layer, x = adapt(make(), init_lora_weights=init, use_dora=dora), inputs()
        torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_batch_is_each_row_alone(kind: str) -> None:
    make, inputs = KINDS[kind]
    layer, x = adapt(make(), "one", "two", init_lora_weights=False), inputs()
    names = ["two", "__base__", "one"]
    rows = []
    for i, name in enumerate(names):
        layer.set_adapter([] if name == "__base__" else name)
        rows.append(layer(x[i : i + 1]))
    layer.set_adapter("one")
    torch.testing.assert_close(layer(x, adapter_names=names), torch.cat(rows), rtol=1e-5, atol=1e-5)


def test_mixed_batch_errors() -> None:
    layer = adapt(nn.Linear(IN, OUT), init_lora_weights=False)
    with pytest.raises(ValueError, match=r"Length of `adapter_names` should be the same .* got 2 and 3"):
        layer(torch.randn(3, IN), adapter_names=["default", "default"])
    layer.merge()
    with pytest.raises(ValueError, match="when there are merged adapters"):
        layer(torch.randn(1, IN), adapter_names=["default"])
    dora = adapt(nn.Linear(IN, OUT), use_dora=True)
    with pytest.raises(ValueError, match="when DoRA is enabled"):
        dora(torch.randn(1, IN), adapter_names=["default"])


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling(rslora: bool) -> None:
    layer = adapt(nn.Linear(IN, OUT), alpha=24, use_rslora=rslora)
    usual = 24 / (math.sqrt(R) if rslora else R)
    assert layer.scaling["default"] == usual
    layer.scale_layer(3)
    layer.scale_layer(1)
    assert layer.scaling["default"] == 3 * usual
    layer.unscale_layer(2)
    assert layer.scaling["default"] == 1.5 * usual
    layer.set_scale("default", 5)
    assert layer.scaling["default"] == 5 * usual
    layer.unscale_layer()
    assert layer.scaling["default"] == usual
    layer.set_scale("nobody", 5)
    assert set(layer.scaling) == {"default"}


def test_dropout_is_on_the_branch_only_and_only_in_training() -> None:
    layer, x = adapt(nn.Linear(IN, OUT), lora_dropout=0.5, init_lora_weights=False), torch.randn(4, IN)
    expected = layer(x)
    assert torch.equal(layer(x), expected)
    layer.train()
    torch.manual_seed(1)
    out = layer(x)
    torch.manual_seed(1)
    dropped = layer.lora_dropout["default"](x)
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    torch.testing.assert_close(out, layer.base_layer(x) + 2 * B(A(dropped)))
    assert isinstance(adapt(nn.Linear(IN, OUT)).lora_dropout["default"], nn.Identity)


def test_lora_bias() -> None:
    layer, x = adapt(nn.Linear(IN, OUT), lora_bias=True, init_lora_weights=False), torch.randn(4, IN)
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    expected = layer.base_layer(x) + 2 * (x @ A.weight.t() @ B.weight.t() + B.bias)
    torch.testing.assert_close(layer(x), expected)
    with pytest.warns(PeftWarning, match="has no bias"):
        adapt(nn.Linear(IN, OUT, bias=False), lora_bias=True)
    with pytest.raises(ValueError, match="lora_bias=True is not supported for Embedding"):
        adapt(nn.Embedding(5, IN), lora_bias=True)


# ---- DoRA


def dora_weight(layer: Any, name: str = "default") -> Tensor:
    """magnitude * (W + delta) / norm by output row, made the long way in float64, in the base's
    orientation."""
    from qlora_engine.base_weight import dense_weight

    base = dense_weight(layer.get_base_layer()).double()
    total = base + layer.get_delta_weight(name).detach().double()
    transposed = layer.fan_in_fan_out or name in layer.lora_embedding_A
    rows = total.t() if transposed else total
    norm = rows.flatten(1).norm(dim=1)
    magnitude = layer.lora_magnitude_vector[name].weight.detach().double().flatten()
    result = rows * (magnitude / norm).reshape(-1, *(1,) * (rows.dim() - 1))
    return result.t() if transposed else result


@pytest.mark.parametrize("kind", KINDS)
def test_dora_forward(kind: str) -> None:
    make, inputs = KINDS[kind]
    layer, x = adapt(make(), init_lora_weights=False, use_dora=True), inputs()
    layer.lora_magnitude_vector["default"].weight.data *= 1 + 0.3 * torch.rand(1)
    dense = with_delta(layer)
    dense.weight.data = dora_weight(layer).float()
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-3, atol=1e-3)


def test_dora_gradients_hold_the_norm_constant() -> None:
    layer, x = adapt(nn.Linear(IN, OUT), init_lora_weights=False, use_dora=True), torch.randn(4, IN)
    layer(x).square().sum().backward()
    A, B = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    magnitude = layer.lora_magnitude_vector["default"].weight
    got = [p.grad.clone() for p in (A, B, magnitude)]
    for p in (A, B, magnitude):
        p.grad = None
    total = layer.base_layer.weight.detach() + 2 * B @ A
    weight = total * (magnitude / total.detach().norm(dim=1)).unsqueeze(1)
    (x @ weight.t() + layer.base_layer.bias.detach()).square().sum().backward()
    for wanted, grad in zip((A.grad, B.grad, magnitude.grad), got, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-3)


def test_dora_with_dropout_drops_the_base_input_too() -> None:
    layer, x = (
        adapt(quant_linear(), lora_dropout=0.5, use_dora=True, init_lora_weights=False),
        torch.randn(4, IN),
    )
    layer.train()
    torch.manual_seed(1)
    out = layer(x)
    torch.manual_seed(1)
    dropped = layer.lora_dropout["default"](x)
    weight = layer.get_base_weight()
    ratio = layer.lora_magnitude_vector["default"].weight / layer.weight_norm("default")
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    expected = layer.base_layer(x) + (ratio - 1) * (dropped @ weight.t()) + ratio * 2 * B(A(dropped))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_dora_norms_are_kept_in_evaluation_until_something_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = adapt(quant_linear(), init_lora_weights=False, use_dora=True), torch.randn(4, IN)
    computed = 0
    before = layer._compute_norm

    def count(*args: Any) -> Tensor:
        nonlocal computed
        computed += 1
        return before(*args)

    monkeypatch.setattr(layer, "_compute_norm", count)
    first = layer(x)
    layer(x)
    assert computed == 1
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(2)
    assert not torch.allclose(layer(x), first)
    assert computed == 2
    layer.set_scale("default", 3)
    layer(x)
    assert computed == 3
    layer.base_layer.set_quantized(quantize(torch.randn(OUT, IN), QuantSpec()))
    layer(x)
    assert computed == 4
    with DoraCaching(False):
        layer(x)
    assert computed == 5
    layer.train()
    layer(x)
    layer(x)
    assert computed == 7


def test_dora_never_makes_a_matrix_of_in_features_squared() -> None:
    """The norm of a wide layer: nothing much larger than one tile of the weight, and no (in, in) matrix."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    layer = adapt(nn.Linear(4096, 16), use_dora=True)
    with Watch():
        layer(torch.randn(2, 4096))
    assert largest <= 4096 * 16


# ---- initialisation


@torch.no_grad()
def effective_error(layer: Any, weight: Tensor) -> float:
    """||W - (base + delta)|| / ||W|| as forward() shows it, by pushing the identity (or every id) through."""
    base = layer.get_base_layer()
    if isinstance(base, (nn.Embedding, QuantEmbedding)):
        got = layer(torch.arange(weight.shape[0]))
    else:
        bias = 0 if base.bias is None else base.bias
        got = (layer(torch.eye(weight.shape[1])) - bias).t()
    return float((weight - got).norm() / weight.norm())


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("alpha", "rslora"), [(R / 2, False), (R, False), (2 * R, False), (4 * R, False), (R, True)]
)
def test_loftq_error_is_the_solver_s_at_every_scaling(
    kind: str, bits: int, alpha: float, rslora: bool
) -> None:
    base: Any = KINDS[kind][0]()
    weight = base.weight.detach().clone()
    weight = weight.t() if kind == "conv1d" else weight
    settings = LoftQConfig(loftq_bits=bits, loftq_iter=3, double_quant=True, svd="exact")
    layer = adapt(base, alpha=alpha, use_rslora=rslora, init_lora_weights="loftq", loftq_config=settings)
    record = layer.init_records["default"]
    assert isinstance(layer.base_layer, (QuantLinear, QuantEmbedding))
    assert effective_error(layer, weight) == pytest.approx(record.error, rel=1e-3, abs=1e-6)
    assert record.error < record.error_plain
    assert record.name == "path.to.it"
    # The scaling is folded, so that all of them solve the same problem.
    if not rslora and alpha == R:
        assert record.scaling == 1
    again = adapt(_like(base, weight, kind), alpha=R, init_lora_weights="loftq", loftq_config=settings)
    assert record.error == pytest.approx(again.init_records["default"].error, rel=1e-4)


def _like(base: Any, weight: Tensor, kind: str) -> nn.Module:
    module: Any = KINDS[kind][0]()
    module.weight.data = (weight.t() if kind == "conv1d" else weight).clone()
    return module


def test_loftq_follows_bits_pattern_and_format() -> None:
    settings = LoftQConfig(loftq_bits=4, bits_pattern={"to.it": 2}, block_size=32)
    layer = adapt(nn.Linear(IN, OUT), init_lora_weights="loftq", loftq_config=settings)
    assert layer.base_layer.spec == QuantSpec("nf2", 32)
    layer = adapt(nn.Linear(IN, OUT), init_lora_weights="loftq", loftq_config=LoftQConfig(format="uint3"))
    assert layer.base_layer.spec == QuantSpec("uint3", 64)


def test_loftq_refusals() -> None:
    options: Any = {"init_lora_weights": "loftq", "loftq_config": LoftQConfig()}
    with pytest.raises(
        ValueError, match=r"full-precision weight, but 'path\.to\.it' \(QuantLinear\) is quantised"
    ):
        adapt(quant_linear(), **options)
    with pytest.raises(ValueError, match=r"not on 'path\.to\.it' \(Conv2d\)"):
        adapt(nn.Conv2d(4, 4, 3), **options)
    with pytest.raises(ValueError, match="max_norm"):
        adapt(nn.Embedding(50, IN, max_norm=1.0), **options)
    with pytest.raises(ValueError, match="rank"):
        adapt(nn.Linear(IN, 4), **options)


def test_loftq_keeps_the_bias_and_frees_the_weight() -> None:
    import gc
    import weakref

    base = nn.Linear(IN, OUT)
    bias, weight = base.bias, weakref.ref(base.weight)
    layer = adapt(base, init_lora_weights="loftq", loftq_config=LoftQConfig())
    del base
    gc.collect()
    assert weight() is None
    assert layer.base_layer.bias is bias


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_methods_that_take_their_part_out_of_the_base(init: str, kind: str) -> None:
    make, inputs = KINDS[kind]
    base, x = make(), inputs()
    expected = base(x).detach()
    layer = adapt(base, init_lora_weights=init)
    assert layer.init_records["default"].error < 1e-6
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_a_quantised_base_and_methods_that_change_it() -> None:
    with pytest.raises(TypeError, match="Please initialize PiSSA under float32"):
        adapt(quant_linear(), init_lora_weights="pissa")
    base, x = quant_linear(), torch.randn(4, IN)
    expected = base(x).detach()
    layer = adapt(base, init_lora_weights="olora")
    assert isinstance(layer.base_layer, QuantLinear)
    error = layer.init_records["default"].error
    assert 0.01 < error < 0.1  # the residual is rounded again: the record says what that costs
    assert float((layer(x) - expected).norm() / expected.norm()) < 2 * error


def test_orthogonal_needs_an_even_rank_and_is_an_identity() -> None:
    layer, x = adapt(nn.Linear(IN, OUT), init_lora_weights="orthogonal"), torch.randn(4, IN)
    torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=1e-4, atol=1e-4)
    assert layer.lora_A["default"].weight.abs().sum() > 0
    with pytest.raises(ValueError, match="rank to be even, got 3"):
        adapt(nn.Linear(IN, OUT), r=3, init_lora_weights="orthogonal")


def test_mica_trains_a_only() -> None:
    layer = adapt(nn.Linear(IN, OUT), "one", "two", init_lora_weights="mica")
    layer.set_adapter("two")
    layer.set_requires_grad("two")
    assert layer.lora_A["two"].weight.requires_grad
    assert not layer.lora_B["two"].weight.requires_grad
    _, _, Vh = torch.linalg.svd(layer.base_layer.weight.t())
    torch.testing.assert_close(
        (Vh[-R:] @ layer.lora_B["two"].weight).abs().sum(0), torch.ones(R), rtol=1e-2, atol=0.5
    )
    assert not layer.lora_A["two"].weight.any()


@pytest.mark.parametrize("init", ["loftQ", "nonsense", "corda"])
def test_unknown_initialisation(init: str) -> None:
    config = LoraConfig()
    config.init_lora_weights = init
    with pytest.raises(ValueError, match="Unknown initialization"):
        create_lora_layer(nn.Linear(IN, OUT), "default", config, r=R, lora_alpha=1)


def test_rank_must_be_positive() -> None:
    for base in (nn.Linear(4, 4), nn.Embedding(4, 4), nn.Conv2d(4, 4, 1)):
        with pytest.raises(
            ValueError, match="`r` should be a positive integer value but the value passed is 0"
        ):
            adapt(base, r=0)


# ---- adapters by name


def test_only_active_adapters_train() -> None:
    layer = adapt(nn.Linear(IN, OUT), "one", "two")
    layer.set_adapter("two")
    assert [layer.lora_A[n].weight.requires_grad for n in ("one", "two")] == [False, True]
    layer.set_adapter("one", inference_mode=True)
    assert not any(p.requires_grad for p in layer.lora_A.parameters())
    layer.set_requires_grad(["one", "two"])
    assert all(p.requires_grad for p in layer.lora_B.parameters())
    layer.set_requires_grad("two", False)
    assert [layer.lora_A[n].weight.requires_grad for n in ("one", "two")] == [True, False]


def test_delete_adapter() -> None:
    layer = adapt(nn.Linear(IN, OUT), "one", "two", use_dora=True)
    with pytest.warns(UserWarning, match="Setting active adapter to two"):
        layer.delete_adapter("one")
    assert layer.active_adapters == ["two"]
    assert layer._get_available_adapters() == {"two"}
    for name in layer.other_param_names:
        assert "one" not in getattr(layer, name)
    layer.delete_adapter("two")
    assert layer.active_adapters == []


def test_custom_modules_come_first() -> None:
    class Mine(nn.Module):
        def __init__(self, base: nn.Module, adapter_name: str, **kwargs: Any) -> None:
            super().__init__()

    config = LoraConfig()
    config._register_custom_module({nn.Linear: Mine})
    assert isinstance(create_lora_layer(nn.Linear(4, 4), "default", config, r=1, lora_alpha=1), Mine)


def test_unsupported_layer() -> None:
    with pytest.raises(ValueError, match=r"Target module LayerNorm.* is not supported"):
        create_lora_layer(nn.LayerNorm(4), "default", LoraConfig(), r=1, lora_alpha=1)


def test_fan_in_fan_out_is_set_right_with_a_warning() -> None:
    config = LoraConfig(fan_in_fan_out=True)
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to False"):
        create_lora_layer(nn.Linear(4, 4), "default", config, r=1, lora_alpha=1)
    assert config.fan_in_fan_out is False
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to True"):
        create_lora_layer(Conv1D(4, 4), "default", config, r=1, lora_alpha=1)
    assert config.fan_in_fan_out is True


def test_groups_must_divide_the_rank() -> None:
    with (
        pytest.warns(UserWarning, match="groups > 1"),
        pytest.raises(ValueError, match="groups=4 and rank 6"),
    ):
        adapt(nn.Conv2d(8, 8, 3, groups=4), r=6)


# ---- what is done to modules


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(kind: str, clone: Any) -> None:
    make, inputs = KINDS[kind]
    layer, x = adapt(make(), "one", "two", init_lora_weights=False, use_dora=True), inputs()
    other = clone(layer)
    assert torch.equal(other(x), layer(x))
    with torch.no_grad():
        for p in other.parameters():
            if p.is_floating_point():
                p.zero_()
    assert layer(x).abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_scales(dtype: torch.dtype) -> None:
    layer, x = adapt(quant_linear(QuantSpec("nf4", 64, True)), init_lora_weights=False), torch.randn(4, IN)
    expected = layer(x)
    weight = layer.base_layer.dequantize()
    layer.to(dtype)
    assert torch.equal(layer.base_layer.dequantize(), weight)
    out = layer(x.to(dtype))
    assert out.dtype == dtype
    assert (out.float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("kind", ["linear", "quantised", "conv1d"])
@pytest.mark.parametrize(
    ("base", "factors", "x"), [("float32", "float32", "bfloat16"), ("bfloat16", "float32", "bfloat16")]
)
def test_mixed_dtypes_give_the_base_s_output_dtype(kind: str, base: str, factors: str, x: str) -> None:
    make, inputs = KINDS[kind]
    layer = adapt(make(), init_lora_weights=False)
    if kind != "quantised":
        layer.base_layer.to(getattr(torch, base))
    for name in ("lora_A", "lora_B"):
        getattr(layer, name).to(getattr(torch, factors))
    dtype = getattr(torch, x if kind == "quantised" else base)
    assert layer(inputs().to(dtype)).dtype == dtype


@pytest.mark.parametrize("kind", ["linear", "quantised", "conv1d", "embedding"])
def test_autocast(kind: str) -> None:
    make, inputs = KINDS[kind]
    layer, x = adapt(make(), init_lora_weights=False), inputs()
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        out.float().sum().backward()
    assert out.dtype == (torch.float32 if kind == "embedding" else torch.bfloat16)
    assert (out.float() - expected).norm() < 0.02 * expected.norm()
    factor = layer.lora_embedding_A["default"] if kind == "embedding" else layer.lora_A["default"].weight
    assert factor.grad.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.3}], ids=str)
def test_gradient_checkpointing(reentrant: bool, options: Any) -> None:
    layer = adapt(quant_linear(), init_lora_weights=False, **options).train()
    x = torch.randn(4, IN, requires_grad=True)

    def gradients(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        layer.zero_grad()
        x.grad = None
        torch.manual_seed(0)
        run(x).square().sum().backward()
        assert x.grad is not None
        return [x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]

    plain = gradients(layer)
    again = gradients(lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    assert len(plain) == len(again) >= 3
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["quantised", "conv1d", "quantised embedding", "conv2"])
@pytest.mark.parametrize("dora", [False, True])
def test_compiles_without_a_break(kind: str, dora: bool) -> None:
    make, inputs = KINDS[kind]
    layer, x = adapt(make(), init_lora_weights=False, use_dora=dora), inputs()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)
    compiled(x).sum().backward()
    factors = layer.lora_embedding_A if "embedding" in kind else layer.lora_A
    assert all(p.grad is not None for p in factors.parameters())


def test_meta_factors_wait_for_a_checkpoint() -> None:
    base = nn.Linear(IN, OUT)
    with torch.device("meta"):
        layer = adapt(base, init_lora_weights="pissa", use_dora=True)
    assert layer.lora_A["default"].weight.is_meta
    assert layer.lora_magnitude_vector["default"].weight.is_meta
    assert not layer.base_layer.weight.is_meta


def test_input_casting_can_be_switched_off() -> None:
    layer = adapt(nn.Linear(IN, OUT).bfloat16(), init_lora_weights=False)
    layer.lora_A.float()
    layer.lora_B.float()
    x = torch.randn(2, IN).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    layer.cast_input_dtype_enabled = False
    with pytest.raises(RuntimeError, match="dtype"):
        layer(x)


def test_embedding_scale_multiplies_both_parts() -> None:
    class Scaled(nn.Embedding):
        embed_scale = torch.tensor(3.0)

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * self.embed_scale

    layer, x = adapt(Scaled(50, IN), init_lora_weights=False), torch.randint(0, 50, (4,))
    weight = layer.base_layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(layer(x), 3 * weight[x])
    layer.base_layer.embed_scale = torch.ones(2)
    with pytest.warns(PeftWarning, match="expected scalar"):
        layer._get_embed_scale()


def test_weight_and_bias_are_the_base_s() -> None:
    layer = adapt(nn.Linear(IN, OUT))
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias
    assert repr(layer).startswith("lora.Linear(")


# ---- bitsandbytes layers


def test_a_bitsandbytes_layer_is_adopted_on_its_storage() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    base = bnb.nn.Linear4bit(IN, OUT, quant_type="nf4", compute_dtype=torch.float32)
    base.load_state_dict(nn.Linear(IN, OUT).state_dict())
    base.to("cpu")
    base(torch.randn(1, IN))  # on a CPU it is quantised when it is moved or first used
    x = torch.randn(3, IN)
    expected = base(x)
    layer = adapt(base)
    assert type(layer.base_layer) is QuantLinear
    assert layer.base_layer.codes.data_ptr() == base.weight.data_ptr()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


# ---- attention and bare Parameters


def test_attention_adapts_both_projections_once() -> None:
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    plain, x = copy.deepcopy(attention), torch.randn(2, 5, 16)
    layer = adapt(attention, r=4, init_lora_weights=False)
    inner = layer.base_layer.out_proj
    plain.in_proj_weight.data += layer.get_delta_weight("default").detach()
    plain.out_proj.weight.data += inner.get_delta_weight("default").detach()
    expected = plain(x, x, x)[0]
    torch.testing.assert_close(layer(x, x, x)[0], expected)
    layer.merge()
    torch.testing.assert_close(layer(x, x, x)[0], expected)
    layer.unmerge()
    torch.testing.assert_close(layer(x, x, x)[0], expected)
    layer(x, x, x)[0].sum().backward()
    for part in (layer, inner):
        assert part.lora_B["default"].weight.grad.abs().sum() > 0
    with pytest.raises(TypeError, match="does not support mixed adapter batches"):
        layer(x, x, x, adapter_names=["default"] * 2)
    assert layer.embed_dim == 16
    assert layer.unload_and_optionally_merge_module(False, False, None) is attention
    assert type(attention.out_proj).__name__ == "NonDynamicallyQuantizableLinear"


def test_attention_in_an_encoder_s_fast_path() -> None:
    """torch reads the projections without calling the layer there; PEFT 0.21 loses the adapter."""
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    encoder.self_attn = adapt(encoder.self_attn, r=4, init_lora_weights=False)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        fast = encoder(x)
        encoder.self_attn.enable_adapters(False)
        assert not torch.allclose(encoder(x), fast, atol=1e-3)
    encoder.self_attn.enable_adapters(True)
    torch.testing.assert_close(encoder(x), fast)


@pytest.mark.parametrize(
    ("attention", "options", "message"),
    [
        ({}, {"use_dora": True}, "does not support DoRA"),
        ({}, {"init_lora_weights": "pissa"}, "does not support init_lora_weights='pissa'"),
        ({"kdim": 4}, {}, "Only same embed for query/key/value"),
    ],
)
def test_attention_refusals(attention: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapt(nn.MultiheadAttention(16, 2, **attention), **options)


class Experts(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.weight = nn.Parameter(torch.randn(3, 6, 10) if transposed else torch.randn(3, 10, 6))

    def forward(self, x: Tensor) -> Tensor:  # (experts, tokens, 6) -> (experts, tokens, 10)
        return x @ (self.weight if self.is_transposed else self.weight.mT)


@pytest.mark.parametrize("transposed", [False, True])
def test_parameters_of_experts(transposed: bool) -> None:
    experts, x = Experts(transposed), torch.randn(3, 4, 6)
    config = LoraConfig(init_lora_weights=False)
    layer: Any = create_lora_layer(experts, "one", config, parameter_name="weight", r=2, lora_alpha=4)
    layer.update_layer("two", 2, lora_alpha=4, config=config)
    layer.set_adapter(["one", "two"])
    A, B = layer.lora_A["one"].weight, layer.lora_B["one"].weight
    assert A.shape == (6, 6)
    assert B.shape == (10, 6)
    delta = layer.get_delta_weight("one")
    for e in range(3):  # PEFT's stacking: A by expert, B by rank and then expert
        product = 2 * B[:, e::3] @ A[2 * e : 2 * e + 2]
        torch.testing.assert_close(delta[e], product.t() if transposed else product)
    weight = experts.weight + delta + layer.get_delta_weight("two")
    expected = x @ (weight if transposed else weight.mT)
    torch.testing.assert_close(layer(x), expected)
    assert "weight" in experts._parameters
    assert "weight" not in vars(experts)
    layer(x).sum().backward()
    assert A.grad.abs().sum() > 0
    bits = experts.weight.detach().clone()
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    layer.unmerge()
    assert torch.equal(experts.weight, bits)
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        layer(x, adapter_names=["one"] * 3)


@pytest.mark.parametrize(
    "options",
    [{"lora_dropout": 0.1}, {"lora_bias": True}, {"use_dora": True}, {"init_lora_weights": "pissa"}],
)
def test_parameters_refusals(options: Any) -> None:
    with pytest.raises(ValueError, match=f"does not work with {next(iter(options))}"):
        create_lora_layer(
            Experts(False), "one", LoraConfig(**options), parameter_name="weight", r=2, lora_alpha=4
        )
