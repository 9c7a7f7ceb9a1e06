"""Memory that shows what nothing was written to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from quant import linear_op


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New tensors and the buffers that products share are NaN until they are written."""
    torch.use_deterministic_algorithms(True)  # and with it torch.utils.deterministic's filling with NaN
    for buffers in (linear_op._gpu_buffers, linear_op._local.__dict__.get("buffers", {})):
        for buffer in buffers.values():
            buffer.fill_(float("nan"))
    yield
    torch.use_deterministic_algorithms(False)
