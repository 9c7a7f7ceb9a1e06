"""Accumulated second moments against float64 NumPy."""

from __future__ import annotations

import numpy as np
import torch

from qlora_engine.hessian import SecondMoment


def test_many_batches_accumulate_without_drift() -> None:
    """64 batches of 512 tokens whose features span five decades, as language models' do.

    The bound is relative to sqrt(H_ii H_jj), the scale of an entry: random rounding of 64 float32 additions
    gives about 8 * 2^-24 = 5e-7.
    """
    rng = np.random.default_rng(0)
    scale = np.logspace(-2.5, 2.5, 96)
    moment, exact = SecondMoment(96), np.zeros((96, 96))
    for _ in range(64):
        x = (rng.standard_t(4, size=(512, 96)) * scale + scale).astype(np.float32)
        moment.add(torch.from_numpy(x))
        exact += x.T.astype(np.float64) @ x.astype(np.float64)
    exact /= 64 * 512
    spread = np.sqrt(np.outer(exact.diagonal(), exact.diagonal()))
    assert np.abs(moment.mean().numpy() - exact).max() <= 1e-6 * spread.max()
    assert (np.abs(moment.mean().numpy() - exact) / spread).max() <= 2e-6
