"""PeftModel: saving, loading, conversion to plain adapters, and whether the base is the right one."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlora_engine import auto
from qlora_engine.adapter_state import get_peft_model_state_dict
from qlora_engine.config import LoftQConfig, LoraConfig, PeftConfig
from qlora_engine.peft_api import PeftModel, get_peft_model
from quant.linear import QuantizedModule
from tests.small_models import MLP, loftq, mlp

IDS = torch.arange(4, 20).view(2, 8)


# ---- files


def test_save_and_load(tmp_path: Path) -> None:
    model, x = mlp(init_lora_weights=False, use_dora=True, modules_to_save=["head"]), torch.randn(3, 16)
    model.add_adapter("other", LoraConfig(target_modules=["first"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "other",
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["inference_mode"] is True
    assert config["auto_mapping"] == {"base_model_class": "MLP", "parent_library": MLP.__module__}
    plain = MLP()
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    again = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path, is_trainable=True)
    assert any(p.requires_grad for p in again.parameters())
    torch.testing.assert_close(again(x), loaded(x))
    loaded.save_pretrained(tmp_path / "second", selected_adapters=["other"])
    assert [p.name for p in (tmp_path / "second").iterdir() if p.is_dir()] == ["other"]


@pytest.mark.parametrize("other", ["0", "base_layer", "weight", "model"])
def test_an_adapter_may_be_called_like_a_part_of_a_path(other: str) -> None:
    """Another adapter of any name takes nothing from what is saved, and saves itself the same."""
    options: dict[str, Any] = {"target_modules": ["0"], "modules_to_save": ["2"], "init_lora_weights": False}
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    wrapped = get_peft_model(model, LoraConfig(bias="all", **options))
    before = get_peft_model_state_dict(wrapped)
    assert {"base_model.model.0.base_layer.bias", "base_model.model.2.weight"} < before.keys()
    wrapped.add_adapter(other, LoraConfig(**options))
    after = get_peft_model_state_dict(wrapped)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    own = get_peft_model_state_dict(wrapped, adapter_name=other)
    assert own.keys() == {key for key in before if "base_layer" not in key and "original_module" not in key}


def test_save_refusals(tmp_path: Path) -> None:
    model = mlp()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="invalid `selected_adapters`"):
        model.save_pretrained(tmp_path, selected_adapters=["nobody"])
    with pytest.raises(ValueError, match="only safetensors are written"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    model.save_pretrained(tmp_path / "nothing", is_main_process=False)
    assert not (tmp_path / "nothing").exists()


def test_load_refusals_leave_the_model_as_it_was(tmp_path: Path) -> None:
    mlp(r=4, target_modules=["first", "head"]).save_pretrained(tmp_path)
    model = mlp(target_modules=["head"])
    names = [n for n, _ in model.named_parameters()]
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="a pickle that could run code"):
        model.load_adapter(tmp_path, "other")
    assert [n for n, _ in model.named_parameters()] == names
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match="The input config must be a PeftConfig"):
        PeftModel.from_pretrained(MLP(), tmp_path, config={})  # type: ignore[arg-type]


def test_mismatched_and_missing_tensors(tmp_path: Path) -> None:
    mlp(r=4).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(MLP(), tmp_path)
    model = mlp(r=3)
    with pytest.warns(UserWarning, match="found shape"):
        model.load_adapter(tmp_path, "default", ignore_mismatched_sizes=True)
    mlp(target_modules=["head"], r=4).save_pretrained(tmp_path / "half")
    config = PeftConfig.from_pretrained(tmp_path / "half")
    config.target_modules = {"first", "head"}
    with pytest.warns(UserWarning, match="Found missing adapter keys while loading the checkpoint: .*first"):
        PeftModel.from_pretrained(MLP(), tmp_path / "half", config=config)


@pytest.mark.parametrize("autocast", [True, False])
def test_low_memory_loading_loses_no_precision(make_model: Any, tmp_path: Path, autocast: bool) -> None:
    base = make_model("llama", dtype=torch.bfloat16)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, use_dora=True)
    get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    options: Any = {"autocast_adapter_dtype": autocast}
    usual = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **options)
    low = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True, **options)
    state = low.state_dict()
    for key, tensor in usual.state_dict().items():
        assert state[key].dtype == tensor.dtype, key
        assert torch.equal(state[key], tensor), key
    assert torch.equal(usual(IDS).logits, low(IDS).logits)


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
@pytest.mark.parametrize("rslora", [False, True])
def test_conversion_to_a_plain_adapter(make_model: Any, tmp_path: Path, init: str, rslora: bool) -> None:
    """What training changed, as a LoRA for the original weights; for LoftQ up to the error of its
    solution."""
    original = make_model("llama")
    options: Any = {"loftq_config": LoftQConfig(loftq_bits=8, loftq_iter=1)} if init == "loftq" else {}
    config = LoraConfig(target_modules="all-linear", init_lora_weights=init, use_rslora=rslora, **options)
    model = get_peft_model(copy.deepcopy(original), config).eval()
    model.save_pretrained(tmp_path / "initial")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    saved = PeftConfig.from_pretrained(tmp_path / "plain")
    assert saved.r == 16
    assert saved.init_lora_weights is True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the base is not the quantised one, on purpose
        plain = PeftModel.from_pretrained(copy.deepcopy(original), tmp_path / "plain")
    expected, got = model(IDS).logits, plain(IDS).logits
    assert (got - expected).norm() < (0.05 if init == "loftq" else 1e-4) * expected.norm()
    assert model.peft_config["default"].r == 8  # the model itself is not changed


# ---- quantised bases


def test_a_loftq_adapter_is_not_solved_again(make_model: Any, tmp_path: Path) -> None:
    model = loftq(make_model("llama"))
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["loftq_config"] == {}
    assert model.peft_config["default"].init_lora_weights == "loftq"
    base = copy.deepcopy(model).unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(loaded(IDS).logits, expected)
    config |= {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))  # as PEFT would leave it
    dense = make_model("llama")
    bits = dense.model.layers[0].self_attn.q_proj.weight.clone()
    with pytest.warns(UserWarning, match="the base is left alone"):
        kept = PeftModel.from_pretrained(dense, tmp_path / "adapter").get_base_model()
    assert torch.equal(kept.model.layers[0].self_attn.q_proj.base_layer.weight, bits)


def test_another_base_is_noticed(make_model: Any, tmp_path: Path) -> None:
    model = loftq(make_model("llama"))
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"belongs to another quantised base: nothing is quantised here"):
        PeftModel.from_pretrained(make_model("llama"), tmp_path)
    base = model.unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        PeftModel.from_pretrained(copy.deepcopy(base).to(torch.bfloat16), tmp_path)
    with pytest.warns(UserWarning, match="has other codes or scales"):
        PeftModel.from_pretrained(loftq(make_model("llama", seed=1)).unload(), tmp_path)


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_a_base_saved_dense_is_known_in_every_dtype(name: str, make_checkpoint: Any, tmp_path: Path) -> None:
    """loftq-init --save-format dense: no warning from its own output, still one from the original model."""
    from transformers import AutoModelForCausalLM

    from qlora_engine.cli import loftq_init

    source, out = make_checkpoint(name), tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        loftq_init.main([str(source), str(out), "--rank", "4", "--quiet", "--save-format", "dense"])
    assert not ended.value.code
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        base = AutoModelForCausalLM.from_pretrained(out, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            PeftModel.from_pretrained(base, out / "loftq_init")
    with pytest.warns(UserWarning, match="belongs to another quantised base: .* has other weights"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), out / "loftq_init")


def test_a_base_loaded_by_bitsandbytes_comes_back_by_unload(make_model: Any, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # Rows of whole blocks: bitsandbytes' own CPU kernel misreads others (tests/parity/test_quant_bnb.py).
    make_model("llama", intermediate_size=128).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    expected = base(IDS).logits
    pointer = base.model.layers[0].mlp.up_proj.weight.data_ptr()
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    adopted = [m for m in model.modules() if isinstance(m, QuantizedModule)]
    assert len(adopted) == 14
    assert pointer in {m.codes.data_ptr() for m in adopted}
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-3, atol=1e-3)
    model(IDS).logits.sum().backward()
    back = model.unload()
    assert isinstance(back.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    assert back.model.layers[0].mlp.up_proj.weight.data_ptr() == pointer
    # As before: where nothing trains, bitsandbytes takes another kernel and lays the weights out anew.
    back.model.embed_tokens.requires_grad_(True)
    torch.testing.assert_close(back(IDS).logits, expected)


# ---- AutoPeftModel


def test_auto_models(make_model: Any, tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = auto.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    with pytest.raises(ValueError, match="Cannot use `AutoPeftModel` with a task type"):
        auto.AutoPeftModel.from_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="Expected target PEFT class: PeftModelForCausalLM"):
        auto.AutoPeftModelForSeq2SeqLM.from_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(OSError, match="is designed to be instantiated using the"):
        auto.AutoPeftModel()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config |= {"task_type": None, "auto_mapping": {"base_model_class": "system", "parent_library": "os"}}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="wants to import 'os' which is not in the import allowlist"):
        auto.AutoPeftModel.from_pretrained(str(tmp_path / "adapter"))
    config["auto_mapping"] = {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
    }
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert torch.equal(
        auto.AutoPeftModel.from_pretrained(str(tmp_path / "adapter"))(IDS).logits, model(IDS).logits
    )
