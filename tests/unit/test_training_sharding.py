"""A sharded model is read layer by layer: what two processes hold of it meanwhile, and afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
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
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(script), str(tmp_path / "base")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held") == 2
