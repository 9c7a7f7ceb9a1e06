from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_engine.errors import InputError
from qlora_engine.partial_model import PartialModel
from tests.conftest import MODELS


def everything(model: Any) -> list[str]:
    return [name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())]


@pytest.mark.parametrize("name", [*MODELS])
def test_load_gives_what_from_pretrained_gives(
    make_checkpoint: Callable[..., Path], make_model: Callable[..., Any], name: str
) -> None:
    import transformers

    folder = make_checkpoint(name, dtype=torch.float32, shard_size="60KB")
    part = PartialModel(folder)
    assert all(p.is_meta for p in part.model.parameters())
    part.load(everything(part.model))
    reference = getattr(transformers, MODELS[name][1]).from_pretrained(folder)
    expected, loaded = reference.state_dict(), part.model.state_dict()
    assert loaded.keys() == expected.keys()
    for key in expected:
        assert torch.equal(loaded[key], expected[key]), key
    ids = torch.arange(3, 15)[None]
    feed = {"input_ids": ids} | ({"decoder_input_ids": ids} if name == "t5" else {})
    with torch.no_grad():
        assert torch.equal(part.model(**feed)[0], reference.eval()(**feed)[0])


@pytest.mark.parametrize("name", ["llama_tied", "qwen3_moe"])
def test_load_touches_only_what_is_asked_and_drop_frees_it(
    make_checkpoint: Callable[..., Path], name: str
) -> None:
    part = PartialModel(make_checkpoint(name))
    names = [n for n in everything(part.model) if n.startswith("model.layers.1.")]
    part.load(names)
    real = {n for n, p in part.model.named_parameters() if not p.is_meta}
    assert real == set(names)
    assert {p.dtype for p in part.model.model.layers[1].parameters()} == {torch.float32}
    part.drop(names)
    assert all(p.is_meta for p in part.model.parameters())
    part.load(names)  # again
    assert not any(p.is_meta for p in part.model.model.layers[1].parameters())


def test_tied_head_shares_the_embedding(make_checkpoint: Callable[..., Path]) -> None:
    part = PartialModel(make_checkpoint("llama_tied"))
    part.load(["model.embed_tokens.weight", "lm_head.weight"])
    assert part.model.lm_head.weight is part.model.model.embed_tokens.weight


def test_names_of_experts_on_disk(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("mixtral", dtype=torch.float32)
    part = PartialModel(folder)
    part.load(everything(part.model))
    stored = load_file(folder / "model.safetensors")
    checked = 0
    for path, name in part.names.items():
        parameter, _, index = name.rpartition(".")
        if not index.isdigit() or "experts" not in path:
            continue
        tensor = stored[f"{path}.weight"]
        fused = part.model.get_parameter(parameter)[int(index)]
        rows = tensor.shape[0]
        assert torch.equal(fused[:rows], tensor) or torch.equal(fused[-rows:], tensor), path
        checked += 1
    assert checked == 2 * 4 * 3


def test_names_of_a_checkpoint_without_the_head(tmp_path: Path, make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    model.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    part = PartialModel(tmp_path)
    assert part.names["layers.0.mlp.up_proj"] == "model.layers.0.mlp.up_proj"
    part.load(["model.layers.0.mlp.up_proj.weight"])
    with pytest.raises(InputError, match=r"lacks 1 tensors of the model, among them lm_head.weight"):
        part.load(["lm_head.weight"])


def test_refuses(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("llama")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model.norm.weight is \(3,\), the model expects \(64,\)"):
        PartialModel(copy).load(["model.norm.weight"])
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "x"}}))
    with pytest.raises(InputError, match="quantised already"):
        PartialModel(copy)
