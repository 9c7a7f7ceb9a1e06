from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from qlora_engine.calibration import Calibration, calibrate
from qlora_engine.errors import InputError
from qlora_engine.hessian import shrink
from qlora_engine.hessian_file import HessianFile, HessianWriter
from qlora_engine.sensitivity import output_sensitivity
from qlora_engine.texts import load_texts


def windows(*lengths: int) -> list[Tensor]:
    return [torch.randint(3, 380, (n,)) for n in lengths]


def assert_same(a: Calibration, b: Calibration) -> None:
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a.mean_input(name), b.mean_input(name), rtol=1e-3, atol=1e-5)
        assert a.layers[name].tokens == b.layers[name].tokens
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5 * float(a[name].abs().max()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral"])
def test_both_modes_agree(
    make_checkpoint: Callable[..., Path], make_model: Callable[..., Any], name: str
) -> None:
    folder, texts = make_checkpoint(name, dtype=torch.float32, shard_size="60KB"), windows(30, 30, 30, 17)
    disk = calibrate(folder, texts)
    memory = calibrate(make_model(name), texts)
    assert (disk.mode, memory.mode) == ("blocks", "whole")
    assert (disk.windows, disk.tokens) == (memory.windows, memory.tokens) == (4, 107)
    assert disk.model == memory.model == type(make_model(name)).__name__
    assert disk.seconds > 0
    assert_same(disk, memory)
    assert_same(memory, calibrate(folder, texts, mode="whole", batch_size=1))
    assert_same(memory, calibrate(make_model(name), texts, mode="blocks", batch_size=3))


def test_text_file_to_hessians(
    make_checkpoint: Callable[..., Path], make_tokenizer: Callable[[], Any], tmp_path: Path
) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"some words about {n}"}) + "\n" for n in range(50)))
    texts = load_texts(path, make_tokenizer(), window=64, num_windows=3)
    calibration = calibrate(make_checkpoint("llama"), texts)
    assert (calibration.windows, calibration.tokens) == (3, 192)
    facts = calibration.layers["model.layers.1.mlp.down_proj"]
    assert (facts.tokens, facts.width, facts.kind, facts.dead) == (192, 96, "full", 0)
    assert facts.condition is not None
    assert facts.condition > 1
    assert calibration["model.layers.1.mlp.down_proj"].dtype == torch.float32


def test_encoder_decoder_runs_whole_and_says_so(make_checkpoint: Callable[..., Path]) -> None:
    folder, texts = make_checkpoint("t5"), windows(30, 30)
    calibration = calibrate(folder, texts)
    assert calibration.mode == "whole"
    assert "an encoder with a decoder is not one list of blocks" in calibration.notes[0]
    assert calibration.layers["encoder.block.0.layer.0.SelfAttention.q"].tokens == 30
    assert calibration.layers["decoder.block.1.layer.1.EncDecAttention.k"].tokens == 30
    # Keys and values of every cross-attention read the encoder's output.
    stored = {
        c.stored
        for n, c in calibration.layers.items()
        if n.endswith(("EncDecAttention.k", "EncDecAttention.v"))
    }
    assert len(stored) == 1
    with pytest.raises(InputError, match="cannot calibrate this model block by block: an encoder"):
        calibrate(folder, texts, mode="blocks")


def test_targets_by_name(make_model: Callable[..., Any]) -> None:
    model = make_model("llama_tied")
    names = ["model.embed_tokens", "lm_head", "model.layers.0.self_attn.q_proj"]
    texts = windows(40, 40)
    for mode in ("whole", "blocks"):
        calibration = calibrate(model, texts, names, mode=mode)  # type: ignore[arg-type]
        assert set(calibration) == set(names)
        frequency = calibration["model.embed_tokens"]
        counts = torch.bincount(torch.cat(texts), minlength=384)
        torch.testing.assert_close(frequency, counts / 80)
        assert calibration.layers["model.embed_tokens"].dead == int((counts == 0).sum())
        assert calibration.layers["model.embed_tokens"].kind == "diagonal"
        assert calibration["lm_head"].shape == (64, 64)
    with pytest.raises(InputError, match="no module 'nowhere'"):
        calibrate(model, texts, ["nowhere"])


def test_the_model_is_left_alone(make_model: Callable[..., Any]) -> None:
    model, before = make_model("llama").train(), make_model("llama").state_dict()
    calibrate(model, windows(20), ["model.layers.0.mlp.up_proj"])
    assert model.training
    assert model.config.use_cache
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_plain_torch_module() -> None:
    model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 5))
    ids = torch.randint(0, 30, (40,))
    calibration = calibrate(model, [ids])
    x = model[0](ids).detach()
    torch.testing.assert_close(calibration["1"], x.T @ x / 40)
    torch.testing.assert_close(calibration.mean_input("1"), x.mean(0))


def test_experts_on_disk_and_in_memory_have_their_names(make_checkpoint: Callable[..., Path]) -> None:
    calibration = calibrate(make_checkpoint("mixtral"), windows(100, 100), min_tokens=1)
    fused = "model.layers.0.mlp.experts"
    names = sorted(n for n in calibration.names if n.startswith("model.layers.0.") and ".1." in n)
    assert len(names) == 3
    for disk in names:
        memory = calibration.names[disk]
        assert memory in (f"{fused}.gate_up_proj.1", f"{fused}.down_proj.1")
        assert torch.equal(calibration[disk], calibration[memory])
        assert calibration.problem(disk) is None
    tokens = [calibration.layers[f"{fused}.gate_up_proj.{e}"].tokens for e in range(4)]
    assert sum(tokens) == 2 * 200
    chosen = calibrate(make_checkpoint("mixtral"), windows(50), [names[0]])
    assert list(chosen.layers) == [calibration.names[names[0]]]


def test_few_tokens_are_a_problem(make_model: Callable[..., Any]) -> None:
    name, texts = "model.layers.0.mlp.down_proj", windows(60)
    calibration = calibrate(make_model("llama"), texts, [name])
    assert calibration.hessian(name) is None
    assert calibration.problem(name) == "only 60 calibration tokens reached it; 64 are needed"
    assert calibration.summary()["not_usable"] == {name: calibration.problem(name)}
    relaxed = calibrate(make_model("llama"), texts, [name], min_tokens=60)
    assert relaxed.hessian(name, shrunk=False) is relaxed[name]
    assert relaxed.problem(name) is None
    assert calibration.problem("elsewhere") == "not calibrated"
    assert calibration.hessian("elsewhere") is None


def test_layers_without_tokens_are_reported(make_model: Callable[..., Any]) -> None:
    model = make_model("mixtral")
    for layer in model.model.layers:  # every token goes to experts 0 and 1
        layer.mlp.gate.weight.data.zero_()
    calibration = calibrate(model, windows(30))
    idle = [n for n, layer in calibration.layers.items() if layer.kind == "none"]
    assert len(idle) == 2 * 2 * 2
    assert calibration.problem(idle[0]) == "no calibration token reached it"
    assert f"8 layers were fed no token, among them {idle[0]}" in calibration.notes
    assert calibration.hessian(idle[0]) is None
    with pytest.raises(KeyError):
        calibration[idle[0]]
    assert idle[0] not in list(calibration)


def test_wide_layers_keep_a_diagonal_and_the_result_says_so(make_model: Callable[..., Any]) -> None:
    found = calibrate(make_model("llama"), windows(40, 40), max_full_width=80)
    name = "model.layers.0.mlp.down_proj"
    assert found.notes == (
        f"2 layers have more than 80 inputs, among them {name}: only the diagonal of their second moment was "
        "kept",
    )
    assert found[name].shape == (96,)
    assert found["model.layers.0.mlp.up_proj"].shape == (64, 64)


def test_save_and_load(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model("mixtral")
    calibration = calibrate(model, windows(90, 90), max_full_width=64)
    path = tmp_path / "c.safetensors"
    calibration.save(path)
    loaded = Calibration.load(path)
    assert loaded.layers == calibration.layers
    assert loaded.summary() == calibration.summary()
    assert list(loaded) == list(calibration)
    for name in calibration:
        assert torch.equal(loaded[name], calibration[name])
        assert torch.equal(loaded.mean_input(name), calibration.mean_input(name))
    with safe_open(path, "pt") as file:  # the library reads it too, and finds shared ones once
        keys = list(file.keys())
        assert file.metadata()["format"] == "pt"
    assert len([key for key in keys if not key.endswith(".mean")]) == loaded.summary()["hessians"]
    assert "model.layers.0.self_attn.q_proj.upper" in keys
    assert "model.layers.0.self_attn.k_proj.upper" not in keys
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_save_to_writes_while_it_runs(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder, texts, path = make_checkpoint("qwen3_moe"), windows(50, 50), tmp_path / "c.safetensors"
    streamed = calibrate(folder, texts, save_to=path)
    assert isinstance(streamed.tensors, HessianFile)
    kept = calibrate(folder, texts)
    assert streamed.names == kept.names
    for name in kept:
        assert torch.equal(streamed[name], kept[name])
        assert torch.equal(streamed.mean_input(name), kept.mean_input(name))
    again = Calibration.load(path)
    assert again.layers == streamed.layers == kept.layers


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_sensitivities_are_measured_and_kept(
    make_checkpoint: Callable[..., Path], make_model: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    texts, path = windows(40, 40, 40, 40), tmp_path / "c.safetensors"
    disk = calibrate(make_checkpoint(name, dtype=torch.float32), texts, sensitivity_windows=2, save_to=path)
    memory = calibrate(make_model(name), texts, sensitivity_windows=2)
    memory.save(tmp_path / "d.safetensors")
    expected = output_sensitivity(make_model(name), texts[::2])
    assert disk.mode == "blocks"
    for found in (disk, memory, Calibration.load(path), Calibration.load(tmp_path / "d.safetensors")):
        assert set(found.sensitivities) == set(found.layers)
        for layer, values in expected.items():
            torch.testing.assert_close(
                found.sensitivity(layer), values, rtol=1e-3, atol=1e-4 * float(values.max())
            )
    assert calibrate(make_model(name), texts).sensitivity(next(iter(expected))) is None
    for one, other in disk.names.items():
        assert torch.equal(disk.sensitivities[other], disk.sensitivity(one))  # type: ignore[arg-type]


def test_groups_are_layers_with_one_input(make_checkpoint: Callable[..., Path]) -> None:
    calibration = calibrate(make_checkpoint("mixtral"), windows(60))
    groups, layer = calibration.groups(), "model.layers.0.self_attn"
    assert groups[f"{layer}.q_proj"] == groups[f"{layer}.k_proj"] == groups[f"{layer}.v_proj"]
    assert groups[f"{layer}.q_proj"] != groups[f"{layer}.o_proj"]
    for one, other in calibration.names.items():
        assert groups[one] == groups[other]


def test_save_to_leaves_nothing_after_an_error(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model, path = make_model("llama"), tmp_path / "c.safetensors"
    model.model.layers[1].mlp.up_proj.weight.data.fill_(float("inf"))
    with pytest.raises(InputError, match=r"the inputs of model.layers.1.mlp.down_proj are not finite"):
        calibrate(model, windows(20), save_to=path, mode="blocks")
    assert list(tmp_path.iterdir()) == []


def test_hessian_checks_the_weight(make_model: Callable[..., Any]) -> None:
    model, name = make_model("llama"), "model.layers.0.mlp.down_proj"
    calibration = calibrate(model, windows(100, 100), [name])
    weight = model.get_submodule(name).weight.detach()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = calibration.hessian(name, weight.to(dtype))
        assert given is not None
        assert torch.equal(given, shrink(calibration[name], calibration.layers[name].shrinkage))
        assert 0 < calibration.layers[name].shrinkage <= 1
    with pytest.raises(InputError, match=r"made with another model: the weight of .*down_proj differs"):
        calibration.hessian(name, weight + 0.1)
    with pytest.raises(InputError, match=r"for 96 inputs, the weight is \(64, 64\)"):
        calibration.hessian(name, torch.zeros(64, 64))


def test_load_refuses(make_model: Callable[..., Any], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(InputError, match="no such calibration file"):
        Calibration.load(tmp_path / "nowhere")
    save_file({"x": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="tensor 'x' is not a Hessian"):
        Calibration.load(tmp_path / "other.safetensors")
    save_file({"x.upper": torch.zeros(3)}, tmp_path / "bare.safetensors")
    with pytest.raises(InputError, match="not a calibration file"):
        Calibration.load(tmp_path / "bare.safetensors")
    calibrate(make_model("llama"), windows(20)).save(tmp_path / "c.safetensors")
    whole = (tmp_path / "c.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[:-40])
    with pytest.raises(InputError, match="not a valid safetensors file"):
        Calibration.load(tmp_path / "short.safetensors")
    newer = whole.replace(b'\\"version\\": 1', b'\\"version\\": 9')
    assert newer != whole
    (tmp_path / "newer.safetensors").write_bytes(newer)
    with pytest.raises(InputError, match="calibration version 9; this reads 1"):
        Calibration.load(tmp_path / "newer.safetensors")


def test_hessian_file_of_a_wrong_triangle(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x.upper": torch.zeros(4), "y.diagonal": torch.ones(2)}, tmp_path / "c.safetensors")
    file = HessianFile(tmp_path / "c.safetensors")
    assert file["y"].tolist() == [1, 1]
    assert len(file) == 2
    with pytest.raises(InputError, match=r"'x.upper' has 4 values, not those of a triangle"):
        file["x"]


def test_hessian_writer_bounds(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    path.write_text("what was there before")
    writer = HessianWriter(path, header_bytes=64)
    writer.add("a long name of a layer that takes room", torch.eye(3))
    with pytest.raises(RuntimeError, match="for a room of 64"):
        writer.close({})
    assert path.read_text() == "what was there before"
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_progress_and_arguments(make_model: Callable[..., Any], make_checkpoint: Callable[..., Path]) -> None:
    seen: list[tuple[int, int, str]] = []
    calibrate(make_checkpoint("llama"), windows(20), progress=lambda *facts: seen.append(facts))
    assert seen == [(1, 2, "model.layers.0"), (2, 2, "model.layers.1")]
    seen.clear()
    calibrate(make_model("llama"), windows(20, 9), progress=lambda *facts: seen.append(facts))
    assert seen == [(1, 2, "windows"), (2, 2, "windows")]
    with pytest.raises(InputError, match="no windows"):
        calibrate(make_model("llama"), [])
    with pytest.raises(ValueError, match="mode must be auto, whole or blocks, got 'half'"):
        calibrate(make_model("llama"), windows(5), mode="half")  # type: ignore[arg-type]


def test_folder_that_is_no_checkpoint(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="no such folder"):
        calibrate(tmp_path / "nowhere", windows(5))
    broken = tmp_path / "broken"
    shutil.copytree(make_checkpoint("llama"), broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has neither model.safetensors"):
        calibrate(broken, windows(5))
