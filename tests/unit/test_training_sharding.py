"""A sharded model is read layer by layer: what two processes hold of it meanwhile, and afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_engine import LoraConfig, PeftModel
from qlora_engine.errors import InputError
from qlora_engine.fingerprint import Fingerprint
from qlora_engine.loading import from_pretrained
from qlora_engine.training import sharding
from qlora_engine.training.recompute import local
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


@pytest.fixture
def one_process() -> Iterator[None]:
    """A group of one: what sharding does, without torchrun."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Any) -> Path:
    from qlora_engine.cli import loftq_init

    out = tmp_path_factory.mktemp("sharded") / "base"
    with pytest.raises(SystemExit) as ended:
        loftq_init.main([str(make_checkpoint("llama")), str(out), "--rank", "4", "--bits", "3", "--quiet"])
    assert ended.value.code in (0, None)
    return out


def sharded(folder: Path, adapter: Path | None, **options: Any) -> Any:
    config = (
        LoraConfig.from_pretrained(str(adapter)) if adapter else LoraConfig(r=4, target_modules="all-linear")
    )
    config.inference_mode = False
    given = {"dtype": torch.float32, "device": torch.device("cpu"), **options}
    return sharding.load_sharded(folder, config, adapter, **given)


@pytest.mark.usefixtures("one_process")
def test_a_group_of_one_has_all_of_the_model(base: Path, tmp_path: Path) -> None:
    adapter = base / "loftq_init"
    model = sharded(base, adapter, embedding_on_host=True)
    alone = PeftModel.from_pretrained(from_pretrained(base, dtype=torch.float32), str(adapter))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, alone(input_ids=ids).logits)
    # of a group of one the whole tensor is the parameter's own
    weights = {name: tensor.clone() for name, tensor in sharding.adapter_weights(model).items()}
    written = load_file(adapter / "adapter_model.safetensors")
    assert weights.keys() == written.keys()
    assert all(torch.equal(weights[name], written[name].float()) for name in written)
    sharding.put_adapter(model, {name: 2 * tensor for name, tensor in weights.items()})
    again = sharding.adapter_weights(model)
    assert all(torch.equal(again[name], 2 * tensor) for name, tensor in weights.items())
    sharding.save_adapter(model, tmp_path / "out", again)
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in again.items())
    made_for, ours = (Fingerprint.read(folder) for folder in (adapter, tmp_path / "out"))
    assert made_for is not None
    assert ours is not None
    assert ours.digests == made_for.digests


@pytest.mark.usefixtures("one_process")
def test_a_new_sharded_adapter_is_drawn_from_the_seed(base: Path) -> None:
    first, same, other = (sharding.adapter_weights(sharded(base, None, seed=seed)) for seed in (3, 3, 4))
    for name, tensor in first.items():
        assert torch.equal(same[name], tensor)
        if "lora_A" in name:
            bound = 1 / tensor.shape[1] ** 0.5
            assert bound / 2 < tensor.abs().max() <= bound
            assert not torch.equal(other[name], tensor)
        else:
            assert not tensor.any()


@pytest.mark.usefixtures("one_process")
def test_the_state_of_a_sharded_optimizer_comes_and_goes(base: Path) -> None:
    trained = [p for p in sharded(base, None).parameters() if p.requires_grad]
    first, second = (torch.optim.AdamW(trained, lr=0.1) for _ in range(2))
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    first.step()
    state = sharding.optimizer_state(first)
    values = [value for entry in state["state"].values() for value in entry.values()]
    assert all(type(value) is torch.Tensor for value in values)
    sharding.load_optimizer_state(second, state)
    for parameter in trained:
        for key, value in first.state[parameter].items():
            assert torch.equal(local(second.state[parameter][key]), local(value))


def _strange(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.nowhere.lora_A.weight"] = torch.ones(4, 4)
    save_file(tensors, path)


def _less(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[min(tensors)]
    save_file(tensors, path)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("spoil", "message"), [(_strange, "has no place for base_model.model.nowhere"), (_less, "no weights for")]
)
def test_a_sharded_adapter_that_does_not_fit(spoil: Any, message: str, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "loftq_init", tmp_path / "adapter")
    spoil(tmp_path / "adapter")
    with pytest.raises(InputError, match=message):
        sharded(base, tmp_path / "adapter")


@pytest.mark.usefixtures("one_process")
def test_what_cannot_be_sharded(base: Path, make_checkpoint: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is dense; a model that is to be sharded"):
        sharded(make_checkpoint("llama"), base / "loftq_init")
    shutil.copytree(base / "loftq_init", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "modules_to_save": ["lm_head"]}))
    with pytest.raises(InputError, match="LoRA factors alone; this adapter also has modules_to_save"):
        sharded(base, tmp_path / "adapter")


@pytest.mark.usefixtures("one_process")
def test_an_adapter_of_another_base_is_told_of(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "loftq_init", tmp_path / "adapter")
    path = tmp_path / "adapter" / "quantization_fingerprint.json"
    values = json.loads(path.read_text())
    first = min(values["modules"])
    values["modules"][first]["digest"] = "0" * 16
    path.write_text(json.dumps(values))
    with pytest.warns(UserWarning, match=rf"another quantised base: 1 of \d+ .* {first}"):
        sharded(base, tmp_path / "adapter")
