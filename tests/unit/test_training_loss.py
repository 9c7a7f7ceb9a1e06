"""The chunked cross entropy against torch's, and where a model's own loss is replaced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qlora_engine.training import loss as module
from qlora_engine.training.loss import chunked_cross_entropy, use_chunked_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Triton is interpreted where there is no GPU


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_equals_torch(
    rows: int, biased: bool, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", 16)
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 12, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(50, 12, generator=generator, dtype=torch.float64)
    bias = torch.randn(50, generator=generator, dtype=torch.float64) if biased else None
    targets = torch.randint(50, (rows,), generator=generator)
    targets[rows // 2 :: 3] = -100
    got = chunked_cross_entropy(hidden, weight, targets, bias, softcap)
    logits = F.linear(hidden, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    want = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    (a,) = torch.autograd.grad(3 * got, hidden)
    (b,) = torch.autograd.grad(3 * want, hidden)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_labels_at_all_is_zero() -> None:
    hidden = torch.randn(4, 8, requires_grad=True)
    total = chunked_cross_entropy(hidden, torch.randn(9, 8), torch.full((4,), -100))
    total.backward()
    assert float(total.detach()) == 0.0
    assert torch.equal(hidden.grad, torch.zeros(4, 8))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_model_loss_and_gradients_are_the_models_own(name: str, make_model: Any) -> None:
    from qlora_engine import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(make_model(name), config).eval()
    ids = torch.randint(3, 300, (2, 20))
    labels = ids.clone()
    labels[:, :6] = -100

    def run() -> tuple[Any, list[torch.Tensor]]:
        model.zero_grad()
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    want, want_gradients = run()
    assert use_chunked_loss(model)
    got, gradients = run()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients, want_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        assert model(input_ids=ids).logits.shape == (2, 20, model.get_base_model().config.vocab_size)
        counted = model(input_ids=ids, labels=labels, num_items_in_batch=7).loss
    torch.testing.assert_close(counted * 7, got * (2 * 14), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ("GraniteConfig", {"logits_scaling": 4.0}),
        ("CohereConfig", {"logit_scale": 0.25}),
        ("Gemma2Config", {"final_logit_softcapping": 2.0}),
        ("PhiConfig", {}),  # a head with a bias
    ],
)
def test_heads_that_do_more_than_multiply(config: str, changes: dict[str, Any]) -> None:
    import transformers

    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.5}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    settings = getattr(transformers, config)(**sizes, **changes)
    model = transformers.AutoModelForCausalLM.from_config(settings).eval()
    model.requires_grad_(False)
    trained = next(p for name, p in model.named_parameters() if "layers.0" in name and p.dim() == 2)
    trained.requires_grad_(True)
    if (head := model.get_output_embeddings()).bias is not None:
        head.bias.normal_()
    ids = torch.randint(3, 300, (2, 10))

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        loss = model(input_ids=ids, labels=ids).loss
        return loss.detach(), torch.autograd.grad(loss, trained)[0]

    want = run()
    assert use_chunked_loss(model) == "chunked"
    for a, b in zip(run(), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_trained_head_keeps_the_models_loss(make_model: Any) -> None:
    model = make_model("llama")
    model.get_output_embeddings().weight.requires_grad_(True)
    assert not use_chunked_loss(model)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_round_the_logits_alone(dtype: torch.dtype, softcap: float | None) -> None:
    """Loss and gradient are those of the rounded logits in float32, of a sure prediction too."""
    torch.manual_seed(3)
    weight = torch.randn(64, 16).to(dtype)
    hidden = (torch.randn(30, 16) + 2 * weight[:30].float()).to(dtype).requires_grad_()
    targets = torch.arange(30) + torch.arange(30) % 2  # half of them sure
    got = chunked_cross_entropy(hidden, weight, targets, None, softcap)
    (a,) = torch.autograd.grad(got, hidden)
    logits = F.linear(hidden.detach(), weight).float().requires_grad_()
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    want = F.cross_entropy(capped, targets, reduction="sum")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    (d,) = torch.autograd.grad(want, logits)
    step = torch.finfo(dtype).eps / 2
    bound = step * (d.abs() @ weight.float().abs()) + 2 * step * (d @ weight.float()).abs()
    least = 2.0**-24 * weight.float().abs().sum(0)  # a probability near 1 in float32, near 0 in float16
    assert ((a.float() - d @ weight.float()).abs() <= bound + least).all()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_in_one_kernel_the_same(
    dtype: torch.dtype, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(module, "CHUNK_ROWS", 16)
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(40, 12, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight, bias = (torch.randn(*s, generator=generator).to(DEVICE, dtype) for s in ((50, 12), (50,)))
    targets = torch.randint(50, (40,), generator=generator).to(DEVICE)
    targets[3::4] = -100

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        loss = chunked_cross_entropy(hidden, weight, targets, bias, softcap)
        return loss.detach(), torch.autograd.grad(3 * loss, hidden)[0]

    monkeypatch.setattr(module, "in_one_kernel", lambda device, dtype: False)
    want = run()
    monkeypatch.setattr(module, "in_one_kernel", lambda device, dtype: True)
    for a, b in zip(run(), want, strict=True):
        scale = float(b.abs().max())
        torch.testing.assert_close(a, b, rtol=1e-5, atol=scale * (1e-5 if dtype == torch.float32 else 2e-3))
    with torch.no_grad():
        torch.testing.assert_close(
            chunked_cross_entropy(hidden, weight, targets, bias, softcap), want[0], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(("dtype", "bytes_each"), [(torch.float32, 4), (torch.bfloat16, 6)])
def test_holds_one_chunk_of_logits(
    dtype: torch.dtype, bytes_each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits and, where they are narrow, a float32 copy; no third tensor of their shape."""
    import weakref

    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(module, "CHUNK_ROWS", 32)
    alive: dict[int, Any] = {}
    most = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal most
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.numel() >= 32 * 500:
                    storage = tensor.untyped_storage()
                    alive[storage.data_ptr()] = weakref.ref(storage), storage.nbytes()
            held = {at: size for at, (ref, size) in alive.items() if ref() is not None}
            most = max(most, sum(held.values()))
            return out

    hidden = torch.randn(100, 8).to(dtype).requires_grad_()
    weight = torch.randn(500, 8).to(dtype)
    with Watch():
        chunked_cross_entropy(hidden, weight, torch.zeros(100, dtype=torch.long))
    assert most == 32 * 500 * bytes_each
