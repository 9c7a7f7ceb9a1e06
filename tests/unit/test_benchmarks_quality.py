"""The benchmarks of quality measure what they say."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality import divergence, log_probabilities, put_run
from benchmarks.recipe_layers import rows
from qlora_engine import PeftModel, from_pretrained
from qlora_engine.inits import initialise
from qlora_engine.pipeline import run
from qlora_engine.plan import make_plan
from quant import QuantSpec


@pytest.mark.parametrize("alpha", [4.0, 8.0])
def test_a_run_put_into_a_model_computes_what_the_run_computes(
    make_checkpoint: Callable[..., Path], make_model: Callable[..., Any], tmp_path: Path, alpha: float
) -> None:
    from qlora_engine.architecture import read_architecture
    from qlora_engine.checkpoint import Checkpoint
    from qlora_engine.options import InitOptions

    checkpoint = Checkpoint.open(make_checkpoint("llama"))
    architecture = read_architecture(checkpoint.folder, checkpoint.config)
    plan = make_plan(checkpoint, architecture, InitOptions(format="nf3", rank=4, alpha=alpha))
    run(plan, tmp_path / "out", device=torch.device("cpu"))
    stored = from_pretrained(tmp_path / "out", dtype=torch.float32)
    stored = PeftModel.from_pretrained(stored, tmp_path / "out" / "loftq_init")
    model = make_model("llama").half().float()  # as the checkpoint has it
    ids = torch.arange(3, 43)[None]
    reference = log_probabilities(model, ids)
    facts = put_run(model, tmp_path / "out")
    assert facts["rank"] == 4
    assert facts["bits a weight"] == pytest.approx(3.5)
    assert facts["layer error (calibration text)"] is None
    assert divergence(model, ids, reference) > 1e-6
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits, stored(input_ids=ids).logits, atol=2e-4, rtol=1e-3
        )


def test_steps_of_the_recipe_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(64, 128, generator=generator)
    X = torch.randn(1000, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    H = X.T @ X / 1000
    errors = [
        initialise(
            W,
            method=row.method,
            spec=QuantSpec("nf2"),
            rank=4,
            iters=row.iters,
            scales=row.scales,
            hessian=H,
        ).output_error
        for row in rows("steps")
    ]
    found = [error for error in errors if error is not None]
    assert len(found) == len(errors) == 13
    assert all(after < 1.02 * before for before, after in itertools.pairwise(found))
    assert found[-1] < 0.8 * found[1]
