"""Gradients averaged over two processes behind backward, as DistributedDataParallel would average them."""

from __future__ import annotations

from pathlib import Path

import torch

from qlora_engine.training.gradients import average_gradients, share_parameters
from tests.torchrun import run_script

SCRIPT = """
import torch
from torch import nn
from qlora_engine import distributed
from qlora_engine.training.gradients import average_gradients, share_parameters

here = distributed.join("cpu")

def make(seed):
    generator = torch.Generator().manual_seed(seed)
    single, double = torch.float32, torch.float64
    shapes = [((3, 5), single), ((7,), double), ((2, 1, 4), single), ((6,), single)]
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(d)) for s, d in shapes]

parameters = make(here.rank)
share_parameters(parameters)
for parameter, first in zip(parameters, make(0)):
    assert torch.equal(parameter, first)

gradients = [[p.detach() for p in make(10 + rank)] for rank in range(2)]
for parameter, gradient in zip(parameters[:2], gradients[here.rank]):
    parameter.grad = gradient.clone()
if here.is_main:  # the third has a gradient in one process, the last in none
    parameters[2].grad = gradients[0][2].clone()
average_gradients(parameters)
for i in (0, 1):
    want = (gradients[0][i] + gradients[1][i]) / 2
    assert torch.equal(parameters[i].grad, want) and parameters[i].grad.dtype == want.dtype
assert torch.equal(parameters[2].grad, gradients[0][2] / 2)
assert parameters[3].grad is None

# a sum that does not fit the dtype, whose mean does
large = nn.Parameter(torch.zeros(2, dtype=torch.float16))
large.grad = torch.tensor([60000.0, 1.0], dtype=torch.float16)
average_gradients([large])
assert large.grad.tolist() == [60000.0, 1.0]
print("averaged", flush=True)
distributed.leave()
"""


def test_mean_over_processes(tmp_path: Path) -> None:
    assert run_script(SCRIPT, tmp_path).count("averaged") == 2


def test_one_process_keeps_what_it_has() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    gradient = torch.randn(3)
    parameter.grad = gradient
    share_parameters([parameter])
    average_gradients([parameter])
    assert parameter.grad is gradient
