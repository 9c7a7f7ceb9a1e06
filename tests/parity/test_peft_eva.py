"""EVA's pass over data against PEFT's: same directions, same ranks, same adapter afterwards.

On purpose different: PEFT cycles through the data until every layer has converged, ours stops after one pass;
layers that are fed the same tensor have equal ratios, and which of them gets the last rank is arbitrary in
both, so ranks are compared without their order there; with rsLoRA ours changes alpha by the root of the
ratio of ranks, so that the scaling stays (PEFT: by the ratio); a layer that no data reached gets a plain
start (PEFT raises KeyError). PEFT cuts every batch to the wanted components and draws its SVD at random, so
on a flat spectrum its last directions are mixtures: there ours must explain at least as much of the variance.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qlora_engine
from qlora_engine import (
    EvaConfig,
    LoraConfig,
    get_eva_state_dict,
    get_peft_model,
    initialize_lora_eva_weights,
)
from qlora_engine.running_pca import RunningPCA
from tests.parity.releases import since

peft = pytest.importorskip("peft")
theirs = pytest.importorskip("peft.tuners.lora.eva")

RANK = 4
QUIET: Any = {"show_progress_bar": False}


class Net(nn.Module):
    """Two layers with the same input, one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(32, 24)
        self.key = nn.Linear(32, 24)
        self.out = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.query(x)) * self.key(x))


def batches(count: int = 6, rows: int = 200) -> list[Tensor]:
    """Rows whose directions have well separated variances, and a mean."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]
    scale = torch.logspace(0.7, -1.5, 32)
    return [torch.randn(rows, 32, generator=generator) * scale @ basis.T + 0.3 for _ in range(count)]


def config(module: Any, **options: Any) -> Any:
    eva = options.pop("eva", {})
    settings: Any = {"target_modules": ["query", "key", "out"], "r": RANK, "lora_alpha": 8, **options}
    return module.LoraConfig(init_lora_weights="eva", eva_config=module.EvaConfig(**eva), **settings)


def hidden(net: Any) -> Tensor:
    """The inputs of ``out``."""
    X = torch.cat(batches())
    with torch.no_grad():
        return torch.tanh(net.query(X)) * net.key(X)


def explained(A: Tensor, X: Tensor) -> float:
    """The share of the variance of rows X (n, in) that directions A (k, in), of any length, hold."""
    directions = torch.linalg.qr(A.T)[0]
    centred = X - X.mean(0)
    return float((centred @ directions).square().sum() / centred.square().sum())


FUNCTIONS: Any = {
    "forward_fn": lambda model, x: model(x),
    "prepare_model_inputs_fn": None,
    "prepare_layer_inputs_fn": None,
}


@pytest.mark.filterwarnings("ignore:lora with eva")
@pytest.mark.parametrize(
    "options",
    [
        {"eva": {"rho": 1.0}},
        {"eva": {"rho": 2.0}},
        {"eva": {"rho": 2.0, "whiten": True, "adjust_scaling_factors": False}},
        {
            "eva": {"rho": 3.0, "tau": 0.999},
            "rank_pattern": {"out": 2, "key": 6},
            "alpha_pattern": {"out": 16},
        },
    ],
)
def test_same_directions_ranks_and_adapter(options: Any) -> None:
    torch.manual_seed(0)
    base = Net()
    models = []
    for module in (qlora_engine, peft):
        model = module.get_peft_model(copy.deepcopy(base), config(module, **copy.deepcopy(options)))
        states = module.get_eva_state_dict if module is qlora_engine else theirs.get_eva_state_dict
        found = states(model, batches(), **FUNCTIONS, **QUIET)
        load = initialize_lora_eva_weights if module is qlora_engine else theirs.initialize_lora_eva_weights
        load(model, eva_state_dict=dict(found))
        models.append((model, found))
    (ours, A), (reference, B) = models
    prefix = "base_model.model."
    assert set(A) == set(B)
    same_input = [f"{prefix}query", f"{prefix}key"]
    assert len(A[f"{prefix}out"]) == len(B[f"{prefix}out"])
    assert sorted(len(A[n]) for n in same_input) == sorted(len(B[n]) for n in same_input)
    for name in A:
        shared = min(len(A[name]), len(B[name]))
        if name in same_input:  # the directions of the net's own inputs are well separated
            cosine = nn.functional.cosine_similarity(A[name][:shared], B[name][:shared].float())
            assert (cosine > 0.98).all(), (name, cosine)
        else:
            X = hidden(base)
            assert explained(A[name][:shared], X) >= 0.999 * explained(B[name][:shared].float(), X)
        ratio = A[name][:shared].norm(dim=1) / B[name][:shared].float().norm(dim=1)
        if not options["eva"].get("whiten"):  # PEFT's singular values grow with every round of its cycle
            torch.testing.assert_close(ratio, torch.ones(shared), rtol=1e-3, atol=0)
    mine, their = ours.peft_config["default"], reference.peft_config["default"]
    assert set(mine.target_modules) == set(their.target_modules)
    if [len(A[n]) for n in same_input] == [len(B[n]) for n in same_input]:
        assert mine.rank_pattern == their.rank_pattern
        assert mine.alpha_pattern == their.alpha_pattern
    for (name, p), (_, q) in zip(ours.named_parameters(), reference.named_parameters()):
        assert "lora_B" not in name or (not p.any() and not q.any())


@since("0.20", "masked labels count")
@pytest.mark.filterwarnings("ignore:lora with eva")
def test_of_a_language_model_only_tokens_that_count_do(make_model: Any) -> None:
    """Padding and masked labels are left out; the result is that of the kept tokens' inputs alone."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 380, (8, 24), generator=generator)
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0
    labels = ids.masked_fill(torch.arange(24) < 4, -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    base = make_model("llama")
    settings: Any = {"target_modules": ["q_proj", "down_proj"], "r": RANK}
    model = get_peft_model(
        base, LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0), **settings)
    )
    found = get_eva_state_dict(model, [batch], **QUIET)
    reference = theirs.get_eva_state_dict(
        peft.get_peft_model(
            make_model("llama"),
            peft.LoraConfig(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0), **settings),
        ),
        [batch],
        **QUIET,
    )
    assert list(found) == list(reference)
    rows: dict[str, Tensor] = {}
    for name in found:
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(lambda _m, args, name=name: rows.__setitem__(name, args[0][:, 4:20]))
    with model.disable_adapter(), torch.no_grad():
        model(**batch)
    for name, A in found.items():
        X = rows[name].reshape(-1, rows[name].shape[-1])
        Vh = torch.linalg.svd(X - X.mean(0), full_matrices=False)[2][:RANK]
        assert ((A * Vh).sum(1).abs() > 1 - 1e-4).all()
        assert explained(A, X) >= explained(reference[name].float(), X) - 1e-6
        assert explained(reference[name].float(), X) > 0.95 * explained(A, X)


def test_running_components_are_those_of_all_rows() -> None:
    X = torch.cat(batches())
    pca = RunningPCA(32, 8)
    for part in X.split(70):
        pca.add(part)
    centred = X - X.mean(0)
    _, S, Vh = torch.linalg.svd(centred, full_matrices=False)
    assert pca.components.shape == (8, 32)
    assert ((pca.components * Vh[:8]).sum(1).abs() > 1 - 1e-3).all()
    torch.testing.assert_close(pca.singular_values, S[:8], rtol=1e-3, atol=0)
    ratio = S[:8].square() / S.square().sum()
    torch.testing.assert_close(pca.explained_variance_ratio, ratio, rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match="not finite"):
        pca.add(torch.full((3, 32), float("nan")))


@pytest.mark.filterwarnings("ignore:lora with eva")
def test_a_layer_of_rank_zero_loses_its_adapter_and_the_file_loads(tmp_path: Path) -> None:
    model = get_peft_model(Net(), config(qlora_engine, eva={"rho": 2.0}))
    prefix = "base_model.model."
    A = {
        f"{prefix}query": torch.randn(8, 32),
        f"{prefix}key": torch.randn(0, 32),
        f"{prefix}out": torch.eye(4, 24),
    }
    initialize_lora_eva_weights(model, eva_state_dict=A)
    net = model.get_base_model()
    assert isinstance(net.key, nn.Linear)
    assert torch.equal(net.query.lora_A["default"].weight, A[f"{prefix}query"])
    assert net.query.scaling["default"] == net.out.scaling["default"] == 2.0
    saved = model.peft_config["default"]
    assert saved.target_modules == {"query", "out"}
    assert saved.rank_pattern == {"query": 8}
    assert saved.alpha_pattern == {"query": 16}
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 32)
    plain = copy.deepcopy(net)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path)
    torch.testing.assert_close(again(x), plain(x))


@pytest.mark.filterwarnings("ignore:lora with eva")
def test_from_a_calibration_as_from_the_data(make_model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 380, (6, 64), generator=generator)
    settings: Any = {"target_modules": ["q_proj", "down_proj"], "r": RANK}
    eva: Any = {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0, tau=1.0)}
    calibration = qlora_engine.calibrate(make_model("llama"), ids)
    model = get_peft_model(make_model("llama"), LoraConfig(**eva, **settings))
    from_data = get_eva_state_dict(model, [{"input_ids": ids}], **QUIET)
    found = get_eva_state_dict(model, calibration, **QUIET)
    assert list(found) == list(from_data)
    for name, A in found.items():
        assert torch.linalg.svdvals(A @ from_data[name].T).min() > 0.99
    initialize_lora_eva_weights(model, calibration, **QUIET)
    layer = model.get_submodule(next(iter(found)))
    assert torch.equal(layer.lora_A["default"].weight, next(iter(found.values())))


@pytest.mark.filterwarnings("ignore:lora with eva")
def test_low_memory_bf16_and_rslora() -> None:
    base = Net().to(torch.bfloat16)
    settings = config(qlora_engine, eva={"rho": 2.0}, use_rslora=True)
    model = get_peft_model(base, settings, low_cpu_mem_usage=True)
    data = [x.to(torch.bfloat16) for x in batches()]
    initialize_lora_eva_weights(model, data, **FUNCTIONS, **QUIET)
    for module in model.modules():
        if isinstance(module, qlora_engine.LoraLayer):
            assert module.lora_A["default"].weight.dtype == torch.float32
            assert not module.lora_B["default"].weight.is_meta
            assert module.scaling["default"] == pytest.approx(8 / RANK**0.5)
    assert model(data[0]).isfinite().all()


def test_refusals() -> None:
    plain = get_peft_model(Net(), LoraConfig(target_modules=["out"]))
    with pytest.raises(ValueError, match="can only be used with `init_lora_weights='eva'`"):
        initialize_lora_eva_weights(plain, batches())
    with pytest.raises(ValueError, match="model must be a PeftModel"):
        initialize_lora_eva_weights(Net(), batches())
    with pytest.raises(ValueError, match="peft_config is required"):
        get_eva_state_dict(Net(), batches())
    settings = config(qlora_engine)
    with pytest.raises(ValueError, match="dataloader is empty"):
        get_eva_state_dict(Net(), [], settings)
    with pytest.raises(ValueError, match="too few tokens for the ranks of"):
        get_eva_state_dict(Net(), [torch.randn(3, 32)], settings, **FUNCTIONS, **QUIET)
    functions: Any = {**FUNCTIONS, "prepare_layer_inputs_fn": {"nobody": lambda x, about, name: x[0]}}
    with pytest.raises(ValueError, match=r"not found in the model: \['nobody'\]"):
        get_eva_state_dict(Net(), batches(), settings, **functions, **QUIET)
    model = get_peft_model(Net(), settings)
    with pytest.raises(ValueError, match="dataloader is required"):
        initialize_lora_eva_weights(model)
    with pytest.raises(ValueError, match="no adapted layers: nobody"):
        initialize_lora_eva_weights(model, eva_state_dict={"nobody": torch.eye(4)})
    with pytest.warns(UserWarning, match=r"init_lora_weights=True .* \['key', 'out'\]"):
        initialize_lora_eva_weights(model, eva_state_dict={"base_model.model.query": torch.eye(4, 32)})


def test_hooks_never_stay() -> None:
    model = Net()

    def data() -> Iterator[Tensor]:
        yield from batches(2)
        raise KeyError

    with pytest.raises(KeyError):
        get_eva_state_dict(model.train(), data(), config(qlora_engine), **FUNCTIONS, **QUIET)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert model.training


_PROCESS = """
import sys, torch, torch.distributed as dist
from tests.parity.test_peft_eva import Net, batches, config, FUNCTIONS, QUIET
import qlora_engine
rank, store = int(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
net = Net()
data = batches(4, 100)
alone = qlora_engine.get_eva_state_dict(net, [torch.cat(data[i:i + 2]) for i in (0, 2)],
                                        config(qlora_engine), **FUNCTIONS, **QUIET)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
both = qlora_engine.get_eva_state_dict(net, data[rank::2], config(qlora_engine), **FUNCTIONS, **QUIET)
for name in alone:
    torch.testing.assert_close(both[name], alone[name], rtol=1e-3, atol=1e-3)
print("equal")
"""


@pytest.mark.slow
def test_two_processes_see_each_other_s_rows(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(_PROCESS)]
    runs = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], env=environment, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    assert [run.communicate(timeout=300)[0].strip() for run in runs] == ["equal", "equal"]
