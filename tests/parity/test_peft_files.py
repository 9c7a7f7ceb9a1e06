"""Adapters written by PEFT load here and ours load in PEFT, tensor for tensor, for every variant."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import qlora_engine as ours
from tests.parity.releases import older_than

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding"),
]
IDS = torch.arange(24).reshape(3, 8) % 20


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 16)
        self.lin = nn.Linear(16, 24)
        self.gpt = Conv1D(20, 24)
        self.conv = nn.Conv2d(8, 4, 3, padding=1)
        self.head = nn.Linear(20, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.gpt(torch.relu(self.lin(self.emb(ids))))  # (batch, 8, 20)
        return self.head(self.conv(x.unflatten(-1, (4, 5))).flatten(-2))


ALL = ["emb", "lin", "gpt", "conv"]
# variant: options of the adapters "default", "q", ...
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "plain": [{}],
    "embedding": [{"target_modules": ["emb"]}],
    "dora": [{"use_dora": True}],
    "rslora, patterns": [{"use_rslora": True, "rank_pattern": {"lin": 2}, "alpha_pattern": {"conv": 5}}],
    "lora_bias": [{"lora_bias": True, "target_modules": ["lin", "gpt", "conv"]}],
    "bias all": [{"bias": "all"}],
    "bias lora_only": [{"bias": "lora_only"}],  # PEFT before 0.21 saves no bias then
    "modules_to_save": [{"modules_to_save": ["head"]}],
    "trainable tokens": [{"target_modules": ["lin"], "trainable_token_indices": {"emb": [1, 4]}}],
    "several": [{}, {"r": 2, "use_dora": True, "target_modules": ["lin"]}, {"modules_to_save": ["head"]}],
    "regex": [{"target_modules": r"(lin|conv)"}],
}


def noisy(library: Any, base: nn.Module, variant: str) -> Any:
    """A PeftModel with the variant's adapters, all of random weights."""
    configs = [
        library.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(ALL), **copy.deepcopy(options)})
        for options in VARIANTS[variant]
    ]
    model = library.get_peft_model(copy.deepcopy(base), configs[0])
    for name, config in zip("qs", configs[1:]):
        model.add_adapter(name, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            trains = ("lora_", "modules_to_save", "trainable_tokens")
            if any(part in name for part in trains) or parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model.eval()


@pytest.mark.parametrize(
    "variant", [name for name in VARIANTS if name != "bias lora_only" or not older_than("0.21")]
)
@pytest.mark.parametrize(("writer", "reader"), [(peft, ours), (ours, peft)], ids=["read", "written"])
def test_adapters_change_hands(writer: Any, reader: Any, variant: str, tmp_path: Path) -> None:
    base = Net()
    source = noisy(writer, base, variant)
    source.save_pretrained(tmp_path)
    model = reader.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    for name in list(source.peft_config)[1:]:
        model.load_adapter(tmp_path / name, name)
    own = source.state_dict()
    assert set(model.state_dict()) == set(own)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, own[name]), name
    for name in source.peft_config:
        source.set_adapter(name)
        model.set_adapter(name)
        torch.testing.assert_close(model(IDS), source(IDS), rtol=1e-4, atol=1e-5)
        a, b = source.peft_config[name].to_dict(), model.peft_config[name].to_dict()
        different = {key for key in a if key in b and a[key] != b[key]}
        assert different <= {"inference_mode", "auto_mapping", "base_model_name_or_path"}, different
    # and on: what was read is written again, the same
    model.save_pretrained(tmp_path / "again")
    first, again = (folder / "adapter_model.safetensors" for folder in (tmp_path, tmp_path / "again"))
    from safetensors.torch import load_file

    wanted, got = load_file(first), load_file(again)
    assert set(got) == set(wanted)
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("variant", ["dora", "modules_to_save", "bias all", "trainable tokens"])
def test_state_dicts_change_hands(variant: str) -> None:
    """get_peft_model_state_dict and set_peft_model_state_dict, crossed."""
    base = Net()
    source = noisy(peft, base, variant)
    tensors = peft.get_peft_model_state_dict(source)
    target = noisy(ours, base, variant)
    result = ours.set_peft_model_state_dict(target, tensors)
    assert not result.unexpected_keys
    mine = ours.get_peft_model_state_dict(target)
    assert set(mine) == set(tensors)
    assert all(torch.equal(mine[key], tensors[key]) for key in tensors)
    torch.testing.assert_close(target(IDS), source(IDS), rtol=1e-4, atol=1e-5)
    back = noisy(peft, base, variant)
    peft.set_peft_model_state_dict(back, mine)
    torch.testing.assert_close(back(IDS), source(IDS))


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_of_transformers_models(name: str, make_model: Any, tmp_path: Path) -> None:
    """With the names, the tied embeddings and the heads that such models have."""
    model = make_model(name)
    task = {"llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": None}[name]
    options: Any = {"target_modules": "all-linear", "task_type": task, "init_lora_weights": False}
    source = ours.get_peft_model(copy.deepcopy(model), ours.LoraConfig(**options)).eval()
    source.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert type(loaded).__name__ == type(source).__name__
    given = {"input_ids": IDS, **({"decoder_input_ids": IDS} if name == "t5" else {})}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**given)[0], source(**given)[0], rtol=1e-4, atol=1e-4)
