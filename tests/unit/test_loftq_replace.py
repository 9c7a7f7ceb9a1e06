"""replace_lora_weights_loftq: the factors it finds on quantised bases, from original weights on the disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quant.formats
from qlora_engine import LoftQConfig, LoraConfig, get_peft_model
from qlora_engine.loftq_replace import replace_lora_weights_loftq
from qlora_engine.lora_layer import LoraLayer

MakeCheckpoint = Callable[..., Path]


def quantised(folder: Path, name: str, fmt: str, targets: list[str], double_quant: bool = False) -> Any:
    """The model of ``folder`` with quantised targets and no adapter."""
    import transformers

    from tests.conftest import MODELS

    model = getattr(transformers, MODELS[name][1]).from_pretrained(folder, dtype=torch.float32)
    settings = LoftQConfig(format=fmt, loftq_iter=1, double_quant=double_quant)
    config = LoraConfig(r=1, target_modules=targets, init_lora_weights="loftq", loftq_config=settings)
    return get_peft_model(model, config).unload()


def adapted(model: Any, targets: list[str], **options: Any) -> Any:
    return get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": targets, **options}))


def originals(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def errors(model: Any, folder: Path) -> dict[str, float]:
    """Relative error of every layer's effective weight, measured on the layers and not told by the solver."""
    weights = originals(folder)
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            name = name.removeprefix("base_model.model.")
            W = weights[f"{name}.weight"].float()
            W = W.t() if getattr(layer.get_base_layer(), "conv1d", False) else W
            layer.merge()
            got = layer.get_base_layer().weight.detach().float()
            got = got.t() if layer.fan_in_fan_out and not layer.lora_embedding_A else got
            found[name] = ((got - W).norm() / W.norm()).item()
            layer.unmerge()
    return found


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("fmt", quant.formats.names())
def test_every_format_is_corrected_as_well_as_the_rank_allows(
    fmt: str, double_quant: bool, make_checkpoint: MakeCheckpoint
) -> None:
    folder = make_checkpoint("llama", shard_size="60KB")
    targets = ["q_proj", "down_proj"]
    model = adapted(quantised(folder, "llama", fmt, targets, double_quant), targets)
    done = replace_lora_weights_loftq(model, folder)
    found = errors(model, folder)
    weights = originals(folder)
    assert len(done) == len(found) == 4
    for record in done:
        layer = model.base_model.model.get_submodule(record.name)
        W = weights[f"{record.name}.weight"].float()
        S = torch.linalg.svdvals(W - layer.base_layer.dequantize(torch.float32))
        best = (S[4:].norm() / W.norm()).item()
        assert best * 0.9999 <= record.error <= best * 1.002
        assert found[record.name] == pytest.approx(record.error, rel=1e-3)
        assert record.error < record.error_base
        assert record.kept


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 2},
        {"lora_alpha": 16},
        {"use_rslora": True, "lora_alpha": 8},
        {"alpha_pattern": {"q_proj": 40}, "rank_pattern": {"down_proj": 2}},
        {"use_dora": True, "lora_alpha": 16},
    ],
    ids=str,
)
def test_scaling_is_honoured(options: dict[str, Any], make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("llama")
    targets = ["q_proj", "down_proj"]
    model = adapted(quantised(folder, "llama", "nf4", targets), targets, **options)
    done = replace_lora_weights_loftq(model, folder, svd="exact")
    found = errors(model, folder)
    for record in done:
        assert found[record.name] == pytest.approx(record.error, rel=1e-3)
        assert record.error < 0.96 * record.error_base


@pytest.mark.parametrize(
    ("name", "targets"), [("gpt2", ["c_attn", "c_fc"]), ("bert", ["query"]), ("llama", ["embed_tokens"])]
)
def test_conv1d_embeddings_and_other_models(
    name: str, targets: list[str], make_checkpoint: MakeCheckpoint
) -> None:
    folder = make_checkpoint(name)
    model = adapted(quantised(folder, name, "nf3", targets), targets, lora_alpha=12)
    done = replace_lora_weights_loftq(model, folder)
    found = errors(model, folder)
    assert done
    for record in done:
        assert found[record.name] == pytest.approx(record.error, rel=1e-3)
        assert record.error < record.error_base


def test_callback_decides_and_sees_the_new_factors(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("llama")
    model = adapted(quantised(folder, "llama", "nf4", ["q_proj"]), ["q_proj"], use_dora=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen = []

    def callback(given: Any, name: str) -> bool:
        layer = given.base_model.model.get_submodule(name)
        assert given is model
        assert layer.lora_B["default"].weight.abs().max() > 0
        seen.append(name)
        return name.startswith("model.layers.1")

    done = replace_lora_weights_loftq(model, folder, callback=callback)
    assert seen == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert [record.kept for record in done] == [False, True]
    for name, parameter in model.named_parameters():
        if "layers.0" in name:
            assert torch.equal(parameter, before[name]), name
    assert model.base_model.model.model.layers[1].self_attn.q_proj.lora_B["default"].weight.abs().max() > 0


def test_a_callback_that_raises_takes_its_layer_back(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("llama")
    model = adapted(quantised(folder, "llama", "nf4", ["q_proj"]), ["q_proj"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def callback(given: Any, name: str) -> bool:
        raise KeyError(name)

    with pytest.raises(KeyError):
        replace_lora_weights_loftq(model, folder, callback=callback)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_dtype_stays_and_the_path_may_be_the_file_or_left_out(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("llama")
    config = LoraConfig(r=4, target_modules=["q_proj"])
    for path in (folder / "model.safetensors", str(folder), None):
        model = get_peft_model(quantised(folder, "llama", "nf4", ["q_proj"]).bfloat16(), config)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        layer.lora_A["default"].bfloat16()
        layer.lora_B["default"].bfloat16()
        done = replace_lora_weights_loftq(model, path)
        assert layer.lora_A["default"].weight.dtype == torch.bfloat16
        assert done[0].error < done[0].error_base


def test_refusals_change_nothing(tmp_path: Path, make_checkpoint: MakeCheckpoint, make_model: Any) -> None:
    folder = make_checkpoint("llama")
    model = adapted(quantised(folder, "llama", "nf4", ["q_proj"]), ["q_proj"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="No bnb LoRA module found on the model"):
        replace_lora_weights_loftq(adapted(make_model("llama"), ["q_proj"]), folder)
    with pytest.raises(ValueError, match="No bnb LoRA module found on the model"):
        replace_lora_weights_loftq(model, folder, adapter_name="other")
    with pytest.raises(FileNotFoundError, match="ensure that there is a"):
        replace_lora_weights_loftq(model, tmp_path)
    with pytest.raises(ValueError, match=r"has no tensor 'model\.layers\.0\.self_attn\.q_proj\.weight'"):
        replace_lora_weights_loftq(model, make_checkpoint("gpt2"))
    other = make_checkpoint("llama", hidden_size=32)
    with pytest.raises(ValueError, match="the full-precision weight"):
        replace_lora_weights_loftq(model, other)
    with pytest.raises(TypeError, match="does not appear to be a valid PeftModel"):
        replace_lora_weights_loftq(model.base_model.model, folder)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.merge_adapter()
    with pytest.raises(ValueError, match="has merged adapters; unmerge them first"):
        replace_lora_weights_loftq(model, folder)
