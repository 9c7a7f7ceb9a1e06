"""task_vectors against PEFT's merge_utils: same numbers from the same tensors and the same random state."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora_engine import task_vectors
from tests.parity.releases import older_than, since

merge_utils = pytest.importorskip("peft.utils.merge_utils")

# rounding makes equal magnitudes, hence draws in the election, and exact zeros
TENSORS = [torch.randn(17, 23).round(decimals=1) for _ in range(3)]
WEIGHTS = torch.tensor([0.7, -1.3, 2.0])

CASES: list[tuple[str, dict[str, Any]]] = [
    ("task_arithmetic", {}),
    *(("magnitude_prune", {"density": d}) for d in (0.0, 0.3, 0.99)),
    *(("dare_linear", {"density": d}) for d in (0.3, 0.99)),
    *(
        (name, {"density": d, "majority_sign_method": method})
        for name in ("ties", "dare_ties")
        for d in (0.3, 0.99)
        for method in ("total", "frequency")
    ),
]


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_same_numbers_as_peft(name: str, arguments: dict[str, Any]) -> None:
    if name.startswith("dare") and older_than("0.19"):
        pytest.skip("PEFT before 0.19: what is kept is not rescaled")
    torch.manual_seed(1)
    theirs = getattr(merge_utils, name)(TENSORS, WEIGHTS, **arguments)
    torch.manual_seed(1)
    ours = getattr(task_vectors, name)(TENSORS, WEIGHTS, **arguments)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("method", ["total", "frequency"])
def test_same_majority_as_peft(method: Any) -> None:
    stack = torch.stack(TENSORS)
    ours = task_vectors.calculate_majority_sign_mask(stack, method)
    assert torch.equal(ours, merge_utils.calculate_majority_sign_mask(stack, method))


@since("0.19", "what is kept is not rescaled")
def test_dare_at_density_zero_is_zero_where_peft_divides_by_zero() -> None:
    assert merge_utils.dare_linear(TENSORS, WEIGHTS, 0.0).isnan().all()
    assert not task_vectors.dare_linear(TENSORS, WEIGHTS, 0.0).any()
