"""Whole models at 4, 3, 2 and 8 bits: adapted, trained, saved, loaded in a new process, merged.

A small random model of each architecture by default. With -m slow real ones, from folders that
QLORA_ENGINE_TEST_MODELS names (separated as PATH is) or from where the demo keeps its model.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_engine import LoftQConfig, LoraConfig, get_peft_model
from quant.linear import QuantizedModule

ROOT = Path(__file__).parents[2]
NAMES = ("gpt2", "llama", "bert", "t5", "qwen3_moe")
BITS = (4, 3, 2, 8)
TASKS = {"gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "qwen3_moe": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
STEPS = 20
_LOAD = """
import sys, torch
from pathlib import Path
from qlora_engine import PeftModel, from_pretrained
torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    model = PeftModel.from_pretrained(from_pretrained(folder / "base"), folder / "adapter")
    with torch.no_grad():
        output = model(**torch.load(folder / "inputs.pt"))
    torch.save(output.get("logits", output.get("last_hidden_state")), folder / "output.pt")
"""


def inputs(name: str, vocabulary: int) -> dict[str, Tensor]:
    ids = torch.randint(3, vocabulary, (4, 12), generator=torch.Generator().manual_seed(1))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return given if name == "bert" else {**given, "labels": ids}


def loss_of(output: Any) -> Tensor:
    if "loss" in output:
        return output.loss
    target = torch.linspace(-1, 1, output.last_hidden_state.shape[-1])
    return (output.last_hidden_state - target).square().mean()


def logits_of(model: Any, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = model.eval()(**given)
    return output.get("logits", output.get("last_hidden_state"))


def adapt(base: Any, name: str, bits: int, **options: Any) -> Any:
    settings: Any = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **options}
    config = LoraConfig(
        task_type=TASKS.get(name),
        init_lora_weights="loftq",
        loftq_config=LoftQConfig(loftq_bits=bits, loftq_iter=1),
        **settings,
    )
    return get_peft_model(base, config)


def train(model: Any, given: dict[str, Tensor], learning_rate: float = 1e-2) -> list[float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    model.train()
    losses = []
    for _ in range(STEPS):
        loss = loss_of(model(**given))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def save(model: Any, given: dict[str, Tensor], folder: Path) -> Path:
    """The adapter, the quantised base and the inputs, for another process."""
    folder.mkdir()
    model.save_pretrained(folder / "adapter")
    copy.deepcopy(model).unload().save_pretrained(folder / "base")
    torch.save(given, folder / "inputs.pt")
    return folder


def load_elsewhere(folders: list[Path]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning:qlora_engine", "-c", _LOAD, *map(str, folders)]
    subprocess.run(command, check=True, env=environment, timeout=600)


@pytest.fixture(scope="module")
def trained(
    request: pytest.FixtureRequest, make_model: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int], Any]:
    """(name, bits) -> (model, inputs, losses, folder) of the selected cases, loaded by one other process."""
    root = tmp_path_factory.mktemp("models")
    mine = [item for item in request.session.items if item.path == request.path]
    wanted = dict.fromkeys(
        (item.callspec.params["name"], item.callspec.params["bits"])  # type: ignore[attr-defined]
        for item in mine
        if "trained" in item.fixturenames  # type: ignore[attr-defined]
    )
    found = {}
    for name, bits in wanted:
        torch.manual_seed(0)
        model = adapt(make_model(name), name, bits)
        given = inputs(name, 380)
        losses = train(model, given)
        found[name, bits] = (model, given, losses, save(model, given, root / f"{name}-{bits}"))
    load_elsewhere([entry[-1] for entry in found.values()])
    return found


# Every model and every width by default, every pair with -m slow.
USUAL = {("gpt2", 4), ("llama", 3), ("bert", 8), ("t5", 2), ("qwen3_moe", 4)}
CASES = [
    pytest.param(n, b, id=f"{n}-{b}", marks=[] if (n, b) in USUAL else [pytest.mark.slow])
    for n in NAMES
    for b in BITS
]


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_the_linears_are_quantised(trained: Any, name: str, bits: int) -> None:
    model, *_ = trained[name, bits]
    packed = [m for m in model.modules() if isinstance(m, QuantizedModule)]
    assert len(packed) >= 8
    assert {m.spec.bits for m in packed} == {bits}
    assert not any(p.requires_grad for m in packed for p in m.parameters())


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_the_loss_falls(trained: Any, name: str, bits: int) -> None:
    losses = trained[name, bits][2]
    assert len(losses) == STEPS
    assert sum(losses[-3:]) / 3 < 0.9 * losses[0], losses


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_another_process_loads_equal_logits(trained: Any, name: str, bits: int) -> None:
    model, given, _, folder = trained[name, bits]
    assert torch.equal(torch.load(folder / "output.pt"), logits_of(model, given))


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_merged_dense_it_computes_the_same(trained: Any, name: str, bits: int) -> None:
    """Dense merging adds no error but float32's rounding."""
    model, given, *_ = trained[name, bits]
    expected = logits_of(model, given)
    dense = copy.deepcopy(model).merge_and_unload()
    assert not any(isinstance(m, QuantizedModule) for m in dense.modules())
    merged = logits_of(dense, given)
    assert (merged - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_merged_and_quantised_again_the_error_is_the_stated_one(trained: Any, name: str, bits: int) -> None:
    model, *_ = trained[name, bits]
    dense = dict(copy.deepcopy(model).merge_and_unload().named_modules())
    again = copy.deepcopy(model).merge_and_unload(requantize="nf4")
    modules = dict(again.named_modules())
    assert len(again.merge_report) >= 8
    for record in again.merge_report:
        weight, stored = dense[record.name].weight.detach(), modules[record.name].dequantize(torch.float32)
        weight = weight.T if type(dense[record.name]).__name__ == "Conv1D" else weight
        error = float((weight - stored).norm() / weight.norm())
        assert error == pytest.approx(record.error, rel=1e-3)


def _real() -> list[Path]:
    named = os.environ.get("QLORA_ENGINE_TEST_MODELS", "")
    folders = [Path(part) for part in named.split(os.pathsep) if part]
    return folders or [path.parent for path in (ROOT / ".cache" / "demo").glob("*/config.json")]


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
def test_real_models(bits: int, tmp_path: Path) -> None:
    """The same of a real language model or encoder; 4 short windows, rank 8."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    folders = [f for f in _real() if "quantization_config" not in (f / "config.json").read_text()]
    if not folders:
        pytest.skip("no model: set QLORA_ENGINE_TEST_MODELS, or run scripts/demo")
    for number, folder in enumerate(folders):
        config = AutoConfig.from_pretrained(folder)
        causal = "CausalLM" in (config.architectures or ["CausalLM"])[0]
        kind = AutoModelForCausalLM if causal else AutoModel
        name = "llama" if causal else "bert"
        torch.manual_seed(0)
        model = adapt(kind.from_pretrained(folder, dtype=torch.float32), name, bits)
        given = inputs(name, config.vocab_size)
        losses = train(model, given, learning_rate=1e-3)
        assert sum(losses[-3:]) / 3 < 0.97 * losses[0], losses
        saved = save(model, given, tmp_path / str(number))
        load_elsewhere([saved])
        expected = logits_of(model, given)
        assert torch.equal(torch.load(saved / "output.pt"), expected)
        merged = logits_of(model.merge_and_unload(), given)
        assert (merged - expected).norm() < 1e-4 * expected.norm()
