"""A sharded model is read layer by layer: what two processes hold of it meanwhile, and afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.parity.releases import since
from tests.torchrun import run_script

pytestmark = since("2.12", "FSDP2 takes no packed weights", "torch")

SCRIPT = """
import sys, torch
from pathlib import Path
from torch.distributed.tensor import DTensor
from qlora_engine import LoraConfig, PeftModel, distributed
from qlora_engine.loading import from_pretrained
from qlora_engine.training import sharding
from qlora_engine.training.recompute import local

here = distributed.join("cpu")
folder = Path(sys.argv[1])
config = LoraConfig.from_pretrained(str(folder / "loftq_init"))
config.inference_mode = False
held = []

def look(model):
    real = [(n, p) for n, p in model.named_parameters() if not p.is_meta]
    whole = [n for n, p in real if not isinstance(p, DTensor) and "lora_" not in n]
    assert not whole, whole  # what has been read is sharded before the next layer is
    held.append(sum(local(p).nbytes for n, p in real if "lora_" not in n))

model = sharding.load_sharded(
    folder, config, folder / "loftq_init", dtype=torch.float32, device=torch.device("cpu"), progress=look)
alone = PeftModel.from_pretrained(from_pretrained(folder, dtype=torch.float32), str(folder / "loftq_init"))
expected = dict(alone.named_parameters())
total = sum(p.nbytes for n, p in expected.items() if "lora_" not in n)
assert len(held) == 7 and held == sorted(held), held  # six layers, then the rest
assert held[0] < total / 20 and held[-1] <= 0.51 * total, (held, total)
for name, parameter in model.named_parameters():
    assert torch.equal(parameter.full_tensor(), expected[name]), name
    assert parameter.requires_grad == ("lora_" in name)
# the adapter comes out whole, and goes back in
weights = sharding.adapter_weights(model)
sharding.put_adapter(model, {name: 2 * tensor for name, tensor in weights.items()})
again = sharding.adapter_weights(model)
assert all(torch.equal(again[name], 2 * tensor) for name, tensor in weights.items())
# so does the optimizer's state
trained = [p for p in model.parameters() if p.requires_grad]
first, second = (torch.optim.AdamW(trained, lr=0.0) for _ in range(2))
for parameter in trained:
    parameter.grad = torch.ones_like(parameter)
first.step()
state = sharding.optimizer_state(first)
assert not any(isinstance(v, DTensor) for entry in state["state"].values() for v in entry.values())
sharding.load_optimizer_state(second, state)
for parameter in trained:
    for key, value in first.state[parameter].items():
        assert torch.equal(local(second.state[parameter][key]), local(value))
print("held", flush=True)
distributed.leave()
"""


@pytest.mark.slow
def test_no_process_holds_the_whole_model(tmp_path: Path, make_checkpoint: Any) -> None:
    from qlora_engine.cli import loftq_init

    model = make_checkpoint("llama", num_hidden_layers=6)
    with pytest.raises(SystemExit) as ended:
        loftq_init.main([str(model), str(tmp_path / "base"), "--rank", "4", "--bits", "3", "--quiet"])
    assert ended.value.code in (0, None)
    assert run_script(SCRIPT, tmp_path, tmp_path / "base").count("held") == 2


FP16 = """
import json, sys
from pathlib import Path
import torch
from qlora_engine import LoraConfig, distributed
from qlora_engine.training import run, sharding
from qlora_engine.training.settings import Settings
from qlora_engine.training.trainer import AdapterTrainer
from transformers import AutoTokenizer

here = distributed.join("cpu")
folder, data, out = map(Path, sys.argv[1:4])
shard, resume = "shard" in sys.argv[4:], "resume" in sys.argv[4:]
# what accelerate does for fp16 on a GPU, which it refuses to on a CPU
make = AdapterTrainer.create_accelerator_and_postprocess
scales = []
def with_scaler(self):
    make(self)
    self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=4)
    self.accelerator.native_amp = True
    self.accelerator.state._mixed_precision = "fp16"
AdapterTrainer.create_accelerator_and_postprocess = with_scaler
step = AdapterTrainer.training_step
def training_step(self, *args, **kwargs):
    scales.append(self.accelerator.scaler.get_scale())
    return step(self, *args, **kwargs)
AdapterTrainer.training_step = training_step
run.precision_of = lambda *_: "fp32"
run._LOST["fp32"] = 10
config = LoraConfig.from_pretrained(str(folder / "loftq_init"))
config.inference_mode = False
if shard:
    model = sharding.load_sharded(
        folder, config, folder / "loftq_init", dtype=torch.float32, device=torch.device("cpu"))
else:
    from qlora_engine import PeftModel
    from qlora_engine.loading import from_pretrained
    base = from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folder / "loftq_init"), is_trainable=True, config=config)
settings = Settings(data=data, output=out, max_steps=12, batch_size=2, max_length=48,
    packing="off", learning_rate=0.01, shard=shard, save_every=6, keep=5)
outcome = run.finetune(model, AutoTokenizer.from_pretrained(folder), settings, resume=resume)
(out / f"found-{here.rank}.json").write_text(json.dumps({"losses": outcome.losses, "scales": scales}))
distributed.leave()
"""


@pytest.mark.slow
def test_fp16_scales_sharded_gradients_as_it_does_copies(tmp_path: Path, make_checkpoint: Any) -> None:
    """Steps whose scaled gradients overflow are passed over by all processes, and the scale is resumed."""
    from qlora_engine.cli import loftq_init

    with pytest.raises(SystemExit):
        loftq_init.main([str(make_checkpoint("llama")), str(tmp_path / "base"), "--rank", "4", "--quiet"])
    rows = [{"prompt": f"{i} plus one is", "completion": f" {i + 1}."} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def start(out: str, *more: str) -> dict[str, Any]:
        run_script(FP16, tmp_path, tmp_path / "base", tmp_path / "rows.jsonl", tmp_path / out, *more)
        found = [json.loads((tmp_path / out / f"found-{rank}.json").read_text()) for rank in range(2)]
        assert found[0] == found[1]
        return found[0]

    copies, shards = start("copies"), start("shards", "shard")
    assert shards["scales"] == copies["scales"]
    assert shards["scales"][0] == 2.0**22 > shards["scales"][-1]  # some steps overflowed
    losses = [torch.tensor(found["losses"]) for found in (shards, copies)]
    torch.testing.assert_close(*losses, rtol=2e-3, atol=2e-3)
    adapters = [load_file(tmp_path / out / "adapter_model.safetensors") for out in ("copies", "shards")]
    start_from = load_file(tmp_path / "base" / "loftq_init" / "adapter_model.safetensors")
    for name, tensor in adapters[0].items():
        assert not torch.equal(tensor, start_from[name])
        torch.testing.assert_close(adapters[1][name], tensor, rtol=1e-2, atol=2e-2)
    shutil.rmtree(tmp_path / "shards" / "checkpoints" / "checkpoint-12")
    again = start("shards", "shard", "resume")
    assert again["losses"] == shards["losses"]
    assert again["scales"] == shards["scales"][6:]
