"""The fused functions in two processes: DDP and FSDP2, with recomputed layers, against one process."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

pytest.importorskip("triton")

from qlora_engine import LoftQConfig, LoraConfig, fused, fused_blocks, fused_norms, get_peft_model
from tests.parity.releases import since


def build() -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    settings = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    dense = AutoModelForCausalLM.from_config(LlamaConfig(**settings, **heads))
    loftq = LoftQConfig(loftq_bits=4, double_quant=True)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="loftq", loftq_config=loftq)
    model = get_peft_model(dense, config)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def halves() -> list[Tensor]:
    return [torch.arange(20).reshape(2, 10) + 50 * i for i in range(2)]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad: Any = parameter.grad
            found[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()
    return found


def calls_of(owner: Any, name: str, counts: dict[str, int]) -> None:
    real = getattr(owner, name)

    def counted(*args: Any) -> Any:
        counts[name] = counts.get(name, 0) + 1
        return real(*args)

    setattr(owner, name, counted)


def worker(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    fused.on_gpu = lambda x: True
    model = build()
    for ids in halves():  # one process, unfused
        fused.set_fused(False)
        (model(input_ids=ids, labels=ids).loss / 2).backward()
    want = gradients(model)
    model.zero_grad()
    fused.set_fused(True)
    assert fused_blocks.enable(model) == 4 + 5 + 2  # blocks, norms, rotary embeddings
    counts: dict[str, int] = {}
    calls_of(fused_blocks, "swiglu_mlp", counts)
    calls_of(fused_blocks, "shared_input", counts)
    calls_of(fused_norms, "rms_norm", counts)
    calls_of(fused_norms, "rotary", counts)
    ids = halves()[rank]
    sharded = copy.deepcopy(model)

    copied = nn.parallel.DistributedDataParallel(model)
    copied(input_ids=ids, labels=ids).loss.backward()
    compare(gradients(model), want)

    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    sharded(input_ids=ids, labels=ids).loss.backward()
    compare(gradients(sharded), want)
    # two layers, run once and once more to recompute, under DDP and under FSDP2
    assert counts == {"swiglu_mlp": 8, "shared_input": 8, "rotary": 8, "rms_norm": 16 + 2}
    dist.destroy_process_group()


def compare(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert len(got) == 28
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@since("2.12", "FSDP2 takes no packed weights", "torch")
@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="no torch.distributed")
def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
