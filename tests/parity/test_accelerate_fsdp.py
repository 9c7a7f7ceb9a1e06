"""accelerate's own FSDP2 wrapping of our model, as Trainer's ``fsdp=True`` does it: the packed weights are
sharded, and two processes compute the loss and gradients of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity.releases import since
from tests.torchrun import run_script

SCRIPT = """
import sys, types
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.tensor import DTensor
from qlora_engine import PeftModel, distributed
from qlora_engine.loading import from_pretrained
from quant.linear import QuantizedModule

here = distributed.join("cpu")

def load():
    base = from_pretrained(sys.argv[1], dtype=torch.float32)
    return PeftModel.from_pretrained(base, sys.argv[1] + "/loftq_init", is_trainable=True)

alone = load()
# on CPUs Accelerator itself knows no FSDP: what its function reads of it
accelerator = types.SimpleNamespace(
    state=types.SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap="LlamaDecoderLayer", cpu_ram_efficient_loading=False)),
    mixed_precision="no", is_main_process=here.is_main, device=torch.device("cpu"), parallelism_config=None)
model = fsdp2_prepare_model(accelerator, load())
packed = [m.codes for m in model.modules() if isinstance(m, QuantizedModule)]
assert packed and all(isinstance(c, DTensor) and c.dtype == torch.uint8 for c in packed)
assert all(c.to_local().shape[0] * 2 == c.shape[0] for c in packed)
ids = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(1))
mine = ids[here.rank : here.rank + 1]
loss = model(input_ids=mine, labels=mine).loss
loss.backward()
want = alone(input_ids=ids, labels=ids).loss
want.backward()
torch.testing.assert_close(torch.tensor(distributed.total(float(loss.detach())) / 2), want.detach())
expected = dict(alone.named_parameters())
compared = 0
for name, parameter in model.named_parameters():
    if parameter.requires_grad:
        torch.testing.assert_close(parameter.grad.full_tensor(), expected[name].grad)
        compared += 1
assert compared == 28
print("equal", flush=True)
distributed.leave()
"""


@since("2.12", "FSDP2 takes no packed weights", "torch")
@pytest.mark.slow
def test_accelerate_shards_our_model(tmp_path: Path, make_checkpoint: object) -> None:
    from qlora_engine.cli import loftq_init

    model = make_checkpoint("llama")  # type: ignore[operator]
    with pytest.raises(SystemExit) as ended:
        loftq_init.main([str(model), str(tmp_path / "base"), "--rank", "4", "--quiet"])
    assert ended.value.code in (0, None)
    assert run_script(SCRIPT, tmp_path, tmp_path / "base").count("equal") == 2
