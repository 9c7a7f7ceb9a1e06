"""RMSNorms and rotary embeddings switched to one kernel each: what is known, equality, what undoes it."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from qlora_engine import LoftQConfig, LoraConfig, fused, fused_blocks, fused_norms, get_peft_model
from qlora_engine.fused_norms import Norm
from qlora_engine.training import graphs, recompute

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# model: (its norm's class, what it computes), whether its attention's rotary embedding is switched
KNOWN: dict[str, tuple[str, tuple[bool, bool, bool], bool]] = {
    "llama.Llama": ("RMSNorm", (False, True, True), True),
    "mistral.Mistral": ("RMSNorm", (False, True, True), True),
    "qwen2.Qwen2": ("RMSNorm", (False, True, True), True),
    "qwen3.Qwen3": ("RMSNorm", (False, True, True), True),
    "phi3.Phi3": ("RMSNorm", (False, True, True), True),
    "gemma.Gemma": ("RMSNorm", (True, False, True), True),
    "gemma2.Gemma2": ("RMSNorm", (True, False, True), True),
    "olmo2.Olmo2": ("RMSNorm", (False, False, True), False),  # rounds what it rotates at the end alone
    "t5.T5": ("LayerNorm", (False, True, False), False),  # has the weight's dtype
}


def norm_class(name: str) -> Any:
    module, _, prefix = name.partition(".")
    return getattr(
        importlib.import_module(f"transformers.models.{module}.modeling_{module}"), prefix + KNOWN[name][0]
    )


@pytest.mark.parametrize("name", KNOWN)
def test_norms_are_known_by_what_they_compute(name: str) -> None:
    _, (one_plus, early, mixed), _ = KNOWN[name]
    module = norm_class(name)(48, eps=3e-5)
    before = module.weight.clone()
    assert fused_norms.recognise(module) == Norm(3e-5, one_plus, early, mixed)
    assert torch.equal(module.weight, before)
    with torch.device("meta"):
        assert fused_norms.recognise(norm_class(name)(48, eps=3e-5)) == Norm(3e-5, one_plus, early, mixed)


def test_other_modules_are_left_alone() -> None:
    class Centred(nn.Module):
        """Looks like one and subtracts the mean."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(16)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            x = x - x.mean(-1, keepdim=True)
            return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))

    class Gated(Centred):
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return super().forward(x) * gate

    class Other(Centred):
        """Twice the eps that it is asked for: it can be told from the smallest rows alone."""

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 2 * self.eps))

    model = nn.Sequential(
        Centred(),
        Gated(),
        Other(),
        nn.LayerNorm(16),
        nn.LayerNorm(16, bias=False),
        nn.PReLU(16),
        nn.Linear(16, 16),
    )
    assert fused_norms.enable(model.requires_grad_(False)) == 0


def rotary_of(module: str) -> Callable[..., Any]:
    found: Callable[..., Any] = importlib.import_module(
        f"transformers.models.{module}.modeling_{module}"
    ).apply_rotary_pos_emb
    return found


def test_rotary_embeddings_are_known_by_what_they_compute() -> None:
    assert all(fused_norms._is_rotary(rotary_of(name)) for name in ("llama", "qwen3", "gemma", "phi3"))
    # pairs of neighbours; rounded at the end alone; a function of other arguments
    assert not any(
        fused_norms._is_rotary(f) for f in (rotary_of("cohere"), rotary_of("olmo"), lambda q: q, None)
    )


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused paths allowed on the CPU, too."""
    monkeypatch.setattr(fused, "on_gpu", lambda x: True)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_the_module(dtype: torch.dtype, weight_dtype: torch.dtype, name: str) -> None:
    """In value, dtype and gradient; float16 to its last bit but for sums in another order."""
    module = norm_class(name)(80, eps=1e-5).to(DEVICE, weight_dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    module.weight.copy_(torch.rand(80, generator=generator) + 0.5)
    x = torch.randn(2, 7, 80, generator=generator).to(DEVICE, dtype).requires_grad_()
    dy = torch.randn(2, 7, 80, generator=generator).to(DEVICE)
    want = module(x)
    (want_dx,) = torch.autograd.grad(want, x, dy.to(want.dtype))
    assert fused_norms.enable(module) == 1
    got = module(x)
    (dx,) = torch.autograd.grad(got, x, dy.to(got.dtype))
    assert got.dtype == want.dtype
    assert dx.dtype == want_dx.dtype
    for a, b in ((got, want), (dx, want_dx)):
        tolerance = 2e-6 if a.dtype == torch.float32 and dtype == torch.float32 else 2e-3
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        if a.dtype == torch.float16 and not (
            b is want_dx and name == "t5.T5"
        ):  # which adds up two rounded parts
            assert float((a == b).float().mean()) > 0.95


def test_heads_and_angles_that_lie_across_memory_are_turned() -> None:
    q, k = (
        torch.randn(2, n, 8, 5, device=DEVICE).mT.requires_grad_() for n in (3, 1)
    )  # (batch, heads, 5, 8)
    cos, sin = (torch.randn(2, 8, 5, device=DEVICE).mT for _ in range(2))
    want = [fused_norms._rotated(x, cos, sin) for x in (q, k)]
    got = fused_norms.rotary(q, k, cos, sin)
    dy = [torch.randn(x.shape[0], x.shape[1], 8, 5, device=DEVICE).mT for x in (q, k)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(torch.autograd.grad(got, (q, k), dy), torch.autograd.grad(want, (q, k), dy), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("on_gpu")
def test_a_trained_weight_gets_its_gradient_from_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = norm_class("llama.Llama")(16).to(DEVICE)
    calls = []
    real = fused_norms.rms_norm
    monkeypatch.setattr(fused_norms, "rms_norm", lambda *args: calls.append(1) or real(*args))
    assert fused_norms.enable(module) == 1
    x = torch.randn(3, 16, device=DEVICE)
    module(x).sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad.any()
    assert not calls
    with torch.no_grad():  # in evaluation nothing is lost
        module(x)
    assert calls == [1]
    fused.set_fused(False)
    try:
        module.requires_grad_(False)(x)
    finally:
        fused.set_fused(True)
    module(x.double())
    assert calls == [1]
    module(x[:0])
    assert calls == [1, 1]


def adapted(make_model: Any, name: str, **options: Any) -> Any:
    config = LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=4)
    )
    options.setdefault("num_hidden_layers", 1)
    return get_peft_model(make_model(name, **options), config).to(DEVICE).train()


def loss_and_gradients(model: nn.Module, **options: Any) -> list[Tensor]:
    ids = torch.arange(24, device=DEVICE).reshape(2, 12) * 7 % 300
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **options).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def close(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-3) -> None:
    assert len(got) == len(want) > 10
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()) + 1e-7)


class Calls:
    """How often the two functions ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.norms = self.rotations = 0
        norm, rotary = fused_norms.rms_norm, fused_norms.rotary

        def counted_norm(*args: Any) -> Tensor:
            self.norms += 1
            return norm(*args)

        def counted_rotary(*args: Any) -> tuple[Tensor, Tensor]:
            self.rotations += 1
            return rotary(*args)

        monkeypatch.setattr(fused_norms, "rms_norm", counted_norm)
        monkeypatch.setattr(fused_norms, "rotary", counted_rotary)

    def taken(self) -> tuple[int, int]:
        """Since the last call."""
        found = self.norms, self.rotations
        self.norms = self.rotations = 0
        return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, on_gpu: None) -> Calls:
    return Calls(monkeypatch)


def position_ids() -> Tensor:
    """Two packed rows."""
    return torch.cat([torch.arange(5), torch.arange(7)]).expand(2, 12).to(DEVICE)


@pytest.mark.parametrize(("name", "norms"), [("llama", 3), ("qwen3", 5)])
def test_models_train_the_same(name: str, norms: int, make_model: Any, calls: Calls) -> None:
    """Plain, with packed rows, recomputed both ways; switched off, copied and undone."""
    model = adapted(make_model, name)
    other = adapted(make_model, name)
    want = loss_and_gradients(model)
    packed = loss_and_gradients(model, position_ids=position_ids())
    assert calls.taken() == (0, 0)
    before = dict(vars(importlib.import_module(f"transformers.models.{name}.modeling_{name}")))
    assert fused_norms.enable(model) == norms + 1
    assert fused_norms.enable(model) == 0
    assert vars(importlib.import_module(f"transformers.models.{name}.modeling_{name}")) == before
    close(loss_and_gradients(model), want)
    assert calls.taken() == (norms, 1)
    loss_and_gradients(other)  # the same class, and nothing of it is switched
    assert calls.taken() == (0, 0)
    close(loss_and_gradients(model, position_ids=position_ids()), packed)
    twin = copy.deepcopy(model)
    calls.taken()
    close(loss_and_gradients(twin), want)
    assert calls.taken() == (norms, 1)
    assert fused_norms.disable(model) == norms + 1
    assert not any("forward" in m.__dict__ or hasattr(m, "_fused_norm") for m in model.modules())
    for a, b in zip(loss_and_gradients(model), want, strict=True):
        assert torch.equal(a, b)
    assert calls.taken() == (0, 0)
    recompute.apply(twin, 1)
    twin.get_base_model().enable_input_require_grads()
    close(loss_and_gradients(twin), want)
    assert calls.taken() == (2 * norms - 1, 2)  # the last norm is not in a layer


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpoint(reentrant: bool, make_model: Any, calls: Calls) -> None:
    layer = adapted(make_model, "qwen3").get_base_model().model.layers[0]
    x = torch.randn(2, 6, 64, device=DEVICE, requires_grad=True)
    angles = torch.randn(2, 1, 6, 16, device=DEVICE).unbind()

    def run() -> Tensor:
        (dx,) = torch.autograd.grad(layer(x, position_embeddings=angles).square().sum(), x)
        return dx

    want = run()
    fused_norms.enable(layer)
    torch.testing.assert_close(run(), want, rtol=1e-3, atol=1e-4)
    x.grad = None
    y = checkpoint(lambda x: layer(x, position_embeddings=angles), x, use_reentrant=reentrant)
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, want, rtol=1e-3, atol=1e-4)
    assert calls.taken() == (4 + 2 * 4, 1 + 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_dtypes_are_the_models_own(
    dtype: torch.dtype, make_model: Any, calls: Calls
) -> None:
    """Float32 norms and angles, products in half: everything as wide as without the kernels."""
    for held in (torch.float32, dtype):
        model = adapted(make_model, "qwen3", dtype=held)
        found: list[list[Any]] = []
        for _ in range(2):
            seen: list[Any] = []
            handles = [
                m.register_forward_hook(
                    lambda m, args, out, seen=seen: seen.append((args[0].dtype, out.dtype))
                )
                for m in model.modules()
                if type(m).__name__ == "Qwen3RMSNorm"
            ]
            with torch.autocast(DEVICE, dtype=dtype):
                got = loss_and_gradients(model)
            for handle in handles:
                handle.remove()
            found.append([seen, got])
            fused_norms.enable(model)
        assert calls.taken() == (5, 1)
        assert found[0][0] == found[1][0]
        close(found[1][1], found[0][1], 8e-2 if dtype == torch.bfloat16 else 2e-2)


def test_generation_is_the_same(make_model: Any, calls: Calls) -> None:
    model = adapted(make_model, "llama").eval()
    ids = torch.tensor([[5, 9, 11], [7, 3, 20]], device=DEVICE)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = model.generate(input_ids=ids, **options)
    fused_norms.enable(model)
    assert torch.equal(model.generate(input_ids=ids, **options), want)
    assert calls.taken() == (6 * 3, 6)


def test_decorated_attentions_are_switched_too(
    make_model: Any, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers 5.24's are, which renames an argument on the way."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    plain, seen = LlamaAttention.forward, []

    @functools.wraps(plain)
    def decorated(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", decorated)
    model = adapted(make_model, "llama")
    want = loss_and_gradients(model)
    assert fused_norms.enable(model) == 4
    close(loss_and_gradients(model), want)
    assert calls.taken() == (3, 1)
    assert len(seen) == 2
    assert fused_norms.disable(model) == 4


def test_replayed_from_graphs(make_model: Any, calls: Calls) -> None:
    """Layers with the kernels in them, repeated the way that CUDA graphs repeat them."""
    from tests.unit.test_training_graphs import capture

    plain = adapted(make_model, "llama")
    replayed = copy.deepcopy(plain)
    fused_norms.enable(replayed)
    for model in (plain, replayed):
        recompute.apply(model, 1)
        model.get_base_model().enable_input_require_grads()
    switched = graphs.GraphedLayers(replayed, capture)
    for _ in range(3):
        close(loss_and_gradients(replayed), loss_and_gradients(plain))
    assert switched.ready


def test_hooks_and_wrapped_modules_keep_theirs(make_model: Any, calls: Calls) -> None:
    model = adapted(make_model, "llama")
    norm = model.get_base_model().model.norm
    norm.forward = lambda x: x  # somebody else's
    attention = model.get_base_model().model.layers[0].self_attn
    attention.forward = type(attention).forward.__get__(attention)
    assert fused_norms.enable(model) == 2
    assert norm.forward(3) == 3
    assert fused_norms.disable(model) == 2
    assert norm.forward(3) == 3


def test_fused_blocks_switches_them_along(make_model: Any, calls: Calls) -> None:
    model = adapted(make_model, "llama")
    assert fused_blocks.enable(model, norms=False) == 2
    loss_and_gradients(model)
    assert calls.taken() == (0, 0)
    assert fused_blocks.enable(model) == 3 + 1
    loss_and_gradients(model)
    assert calls.taken() == (3, 1)
    assert fused_blocks.disable(model) == 2 + 3 + 1


def test_a_layer_compiles_without_a_break(make_model: Any, calls: Calls) -> None:
    """As it does unfused: the compiler fuses what it sees."""
    model = adapted(make_model, "qwen3")
    fused_blocks.enable(model)
    layer = model.get_base_model().model.layers[0]
    angles = torch.randn(2, 1, 6, 16, device=DEVICE).unbind()

    def run(x: Tensor) -> Tensor:
        y: Tensor = layer(x, position_embeddings=angles)
        return y

    x = torch.randn(2, 6, 64, device=DEVICE, requires_grad=True)
    (want,) = torch.autograd.grad(run(x).square().sum(), x)
    assert calls.taken() == (4, 1)
    torch._dynamo.reset()
    try:
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    finally:
        torch._dynamo.reset()
    assert calls.taken() == (0, 0)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_without_triton_only_query_key_and_value_are_switched(
    make_model: Any, monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    model = adapted(make_model, "llama")
    want = loss_and_gradients(model)
    monkeypatch.setattr(fused, "has_triton", lambda: False)
    assert fused_blocks.enable(model) == 1
    close(loss_and_gradients(model), want)
    assert calls.taken() == (0, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype: torch.dtype, make_model: Any) -> None:
    """A model's own dtype, values to the last bit but for sums in another order, and the memory kept."""
    module = norm_class("llama.Llama")(4096).to("cuda", dtype).requires_grad_(False)
    module.weight.normal_()
    x = torch.randn(300, 4096, device="cuda", dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x)

    def run() -> tuple[Tensor, Tensor, int]:
        before = torch.cuda.memory_allocated()
        y = module(x)
        kept = torch.cuda.memory_allocated() - before
        return y.detach(), torch.autograd.grad(y, x, dy)[0], kept

    want, want_dx, kept = run()
    fused_norms.enable(module)
    got, dx, less = run()
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(got, want, rtol=2 * step, atol=1e-6)
    torch.testing.assert_close(dx, want_dx, rtol=4 * step, atol=4 * step)
    if dtype != torch.float32:
        assert float((got == want).float().mean()) > 0.99
        assert less < x.nbytes + (1 << 14) < kept  # the output; of float32 nothing was copied either
    rotate = rotary_of("llama")
    for shape, k_shape in (((2, 100, 32, 128), (2, 100, 8, 128)), ((1, 7, 6, 64), (1, 7, 1, 64))):
        q, k = (torch.randn(s, device="cuda", dtype=dtype).transpose(1, 2) for s in (shape, k_shape))
        cos, sin = (torch.randn(1, shape[1], shape[3], device="cuda", dtype=dtype) for _ in range(2))
        for a, b in zip(fused_norms.rotary(q, k, cos, sin), rotate(q, k, cos, sin), strict=True):
            assert torch.equal(a, b)
    model = adapted(make_model, "qwen3", dtype=dtype)
    want_all = loss_and_gradients(model)
    assert fused_norms.enable(model) == 5 + 1
    close(loss_and_gradients(model), want_all, 1e-3 if dtype == torch.float32 else 8e-2)
