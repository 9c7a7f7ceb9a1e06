"""The kernel of the cross entropy against float64: losses, and the gradient where the logits were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quant.backends import triton_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter truncates to bfloat16 where a GPU rounds: a whole unit in the last place, not half
ROUNDED = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7 if DEVICE == "cpu" else 2**-8}


def exact(logits: Tensor, targets: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    x = logits.cpu().double().requires_grad_()
    capped = x if softcap is None else softcap * torch.tanh(x / softcap)
    losses = torch.logsumexp(capped, 1) - capped.gather(1, targets.cpu()[:, None]).squeeze(1)
    return losses.detach(), torch.autograd.grad(losses.sum(), x)[0]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", list(ROUNDED), ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 50), (2, 8192), (2, 8193), (1, 20000)])
def test_losses_and_gradient(rows: int, columns: int, dtype: torch.dtype, softcap: float | None) -> None:
    """Rows with a gap between them, columns around a program's block, a sure and a hopeless prediction."""
    generator = torch.Generator().manual_seed(columns)
    storage = torch.full((rows, columns + 5), float("nan"), dtype=dtype, device=DEVICE)
    logits = storage[:, 3 : columns + 3]
    logits.copy_(torch.randn(rows, columns, generator=generator) * 4)
    targets = torch.randint(columns, (rows,), generator=generator).to(DEVICE)
    logits[0, targets[0]] = 60.0
    logits[-1, targets[-1]] = -60.0
    want, want_gradient = exact(logits, targets, softcap)
    losses = torch.full((rows + 2,), float("nan"), device=DEVICE)
    before = logits.clone()
    triton_loss.cross_entropy(logits, targets, losses[1:-1], softcap=softcap, gradient=False)
    assert torch.equal(logits, before)
    torch.testing.assert_close(losses[1:-1].cpu().double(), want, rtol=2e-6, atol=2e-5)
    losses.fill_(float("nan"))
    triton_loss.cross_entropy(logits, targets, losses[1:-1], softcap=softcap)
    torch.testing.assert_close(losses[1:-1].cpu().double(), want, rtol=2e-6, atol=2e-5)
    smallest = 2.0**-24 if dtype == torch.float16 else 1e-6  # a probability; softcap's 1 - t^2 near t = 1
    torch.testing.assert_close(logits.cpu().double(), want_gradient, rtol=2 * ROUNDED[dtype], atol=smallest)
    assert storage.isnan().sum() == rows * 5
    assert losses.isnan().sum() == 2


def test_targets_beyond_the_vocabulary_show() -> None:
    for target in (-1, 7, 2**40):
        logits, losses = torch.randn(2, 7, device=DEVICE), torch.empty(2, device=DEVICE)
        triton_loss.cross_entropy(logits, torch.tensor([3, target], device=DEVICE), losses)
        assert losses.isnan().tolist() == [False, True]


def test_infinite_logits_are_no_probability() -> None:
    logits = torch.zeros(1, 9000, device=DEVICE)
    logits[0, :8200] = float("-inf")  # a whole block of them, and the first of the next
    losses = torch.empty(1, device=DEVICE)
    logits_in = logits.clone()
    triton_loss.cross_entropy(logits_in, torch.tensor([8500], device=DEVICE), losses)
    assert float(losses) == pytest.approx(float(torch.tensor(800.0).log()), rel=1e-6)
    assert torch.equal(logits_in[0, :8200], torch.zeros(8200, device=DEVICE))


def test_what_does_not_fit_is_refused() -> None:
    logits, losses = torch.randn(4, 8, device=DEVICE), torch.empty(4, device=DEVICE)
    targets = torch.zeros(4, dtype=torch.long, device=DEVICE)
    for bad in (
        {"logits": torch.randn(8, 4, device=DEVICE).t()},
        {"targets": targets[:3]},
        {"losses": losses[:3]},
        {"logits": logits[:, :0]},
    ):
        with pytest.raises(ValueError, match="do not fit"):
            triton_loss.cross_entropy(**{"logits": logits, "targets": targets, "losses": losses, **bad})
