"""Properties of initialise() over random shapes, formats, ranks and scalings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_engine.inits import initialise
from quant import QuantizedTensor, QuantSpec, formats

specs = st.builds(
    QuantSpec, st.sampled_from(formats.names()), st.sampled_from([16, 64, 256]), double_quant=st.booleans()
)


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    m, n = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    W = rng.standard_normal((m, n)) if draw(st.booleans()) else rng.standard_t(3, (m, n))
    if draw(st.booleans()):
        W[: m // 3] = 0
    if draw(st.booleans()):
        W[:, : n // 2] *= 20
    return torch.from_numpy(W).to(draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])))


@settings(max_examples=80)
@given(
    W=weights(),
    spec=specs,
    method=st.sampled_from(["loftq", "qpissa"]),
    scales=st.sampled_from(["absmax", "mse", "signed-mse"]),
    scaling=st.floats(0.01, 64),
    factor_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_never_worse_than_plain_and_truly_reported(
    W: torch.Tensor,
    spec: QuantSpec,
    method: str,
    scales: str,
    scaling: float,
    factor_dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    rank = data.draw(st.integers(1, min(W.shape)))
    done = initialise(
        W,
        method=method,
        rank=rank,
        spec=spec,
        scales=scales,
        scaling=scaling,
        factor_dtype=factor_dtype,
        iters=3,
    )
    assert isinstance(done.base, QuantizedTensor)
    wide = W.double()
    left = wide - done.base.dequantize(torch.float32).double() - scaling * done.B.double() @ done.A.double()
    norm = float(wide.norm())
    assert done.error == pytest.approx(float(left.norm()) / norm if norm else 0.0, rel=1e-3, abs=2e-6)
    assert done.error_plain is not None
    assert done.error <= done.error_plain
    assert len(done.trace) <= 4
    assert 0 <= done.best < len(done.trace)


@settings(max_examples=30)
@given(
    W=weights(), spec=specs, power=st.integers(-8, 8), method=st.sampled_from(["loftq", "qpissa", "pissa"])
)
def test_scale_equivariance(W: torch.Tensor, spec: QuantSpec, power: int, method: str) -> None:
    """A power of two goes through every step unchanged, but for double quantisation's float32 offset."""
    W, rank = W.float(), 1
    one = initialise(W, method=method, rank=rank, spec=spec, iters=2)
    other = initialise(W * 2.0**power, method=method, rank=rank, spec=spec, iters=2)
    assert other.error == pytest.approx(one.error, rel=1e-2, abs=1e-6)
