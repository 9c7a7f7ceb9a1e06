"""Many tensors, large tensors, long configs, many adapters, many rounds: nothing grows that should not."""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qlora_engine as qe
from qlora_engine.report import RunReport
from qlora_engine.safetensors_io import read_header
from tests.cli.command import ROOT, finish, invoke, start

MakeCheckpoint = Callable[..., Path]
MB = 1 << 20


def resident() -> int:
    """Bytes of memory in use now."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
def test_thousands_of_tensors_in_small_shards(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    """3,203 tensors; the output in shards of 1 MB. Files are opened and closed, not kept."""
    sizes = {"num_hidden_layers": 400, "hidden_size": 16, "intermediate_size": 16, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": False}
    source = make_checkpoint("llama", shard_size="1MB", **sizes, **heads)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limit[1]))
    try:
        result = finish(start(source, tmp_path / "out", "--rank", 2, "--max-shard-size", "1MB", "--quiet"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert result.code == 0, result.err
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert all(shard.stat().st_size < 1.3e6 for shard in shards)  # the header is not counted
    report = RunReport.read(tmp_path / "out")
    assert len(report.layers) == 2800
    assert report.peak_rss < 900 * MB


@pytest.mark.slow
def test_one_tensor_of_a_gigabyte(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    """A vocabulary of 8 million in a sparse file: it is copied 8 MB at a time."""
    rows = 8_000_000
    small = make_checkpoint("llama_tied")
    source = tmp_path / "model"
    source.mkdir()
    config = json.loads((small / "config.json").read_text()) | {"vocab_size": rows}
    (source / "config.json").write_text(json.dumps(config))
    entries = read_header(small / "model.safetensors")[0]
    header: dict[str, Any] = {}
    position = 0
    for name, entry in entries.items():
        shape = [rows, 64] if "embed_tokens" in name else list(entry.shape)
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    with (source / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, entry in entries.items():
            if "embed_tokens" not in name:
                file.seek(8 + len(text) + header[name]["data_offsets"][0])
                file.write(b"".join(bytes(chunk) for chunk in entry.chunks()))
        file.truncate(8 + len(text) + position)
    result = finish(start(source, tmp_path / "out", "--rank", 2, "--quiet"))
    assert result.code == 0, result.err
    report = RunReport.read(tmp_path / "out")
    assert report.bytes_out > 1_000_000_000
    assert report.peak_rss < 800 * MB  # torch and transformers take 550
    (tmp_path / "out" / "model.safetensors").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["json", "toml"])
def test_a_config_of_ten_thousand_lines(ending: str, tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    patterns = {f"layers.{i}.mlp.up_proj": 3 for i in range(1, 10_000)}
    path = tmp_path / f"recipe.{ending}"
    if ending == "json":
        path.write_text(json.dumps({"rank": 2, "bits-pattern": patterns, "save-format": "native"}, indent=0))
    else:
        lines = "".join(f'"{key}" = {value}\n' for key, value in patterns.items())
        path.write_text(f'rank = 2\nsave-format = "native"\n[bits-pattern]\n{lines}')
    began = time.process_time()
    result = invoke(make_checkpoint("llama"), tmp_path / "out", "--config", path, "--quiet")
    assert result.code == 0, result.err
    assert time.process_time() - began < 60
    widths = {layer.name: layer.format for layer in RunReport.read(tmp_path / "out").layers}
    assert widths["model.layers.1.mlp.up_proj"] == "nf3"
    assert widths["model.layers.0.mlp.up_proj"] == "nf4"


@pytest.mark.slow
def test_a_list_of_ten_thousand_targets(make_model: Callable[..., Any]) -> None:
    names = [f"name_{i}" for i in range(10_000)] + ["q_proj"]
    config = qe.LoraConfig(r=2, target_modules=names, rank_pattern={f"x{i}": 3 for i in range(10_000)})
    began = time.process_time()
    model = qe.get_peft_model(make_model("llama"), config)
    assert time.process_time() - began < 60
    assert {name.split(".")[-1] for name in model.targeted_module_names} == {"q_proj"}


@pytest.mark.slow
def test_memory_is_flat_over_fifty_adapters(make_model: Callable[..., Any]) -> None:
    base = make_model("llama", hidden_size=512, intermediate_size=1024)
    config = qe.LoraConfig(r=64, target_modules="all-linear")
    model = qe.get_peft_model(base, config)
    size = sum(p.nbytes for n, p in model.named_parameters() if "lora_" in n)
    assert size > 3 * MB

    def round_(number: int) -> None:
        model.add_adapter(f"a{number}", config)
        model.set_adapter(f"a{number}")
        model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
        model.zero_grad()
        model.set_adapter("default")
        model.delete_adapter(f"a{number}")

    for number in range(5):
        round_(number)
    before, names = resident(), set(model.state_dict())
    for number in range(5, 55):
        round_(number)
    assert set(model.state_dict()) == names
    assert resident() - before < 2 * size  # fifty would be fifty times it


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "float16", "nf4"])
def test_a_thousand_merges_leave_the_weights_bit_equal(kind: str, make_model: Callable[..., Any]) -> None:
    dtype = torch.float16 if kind == "float16" else torch.float32
    options: dict[str, Any] = {"init_lora_weights": False}
    if kind == "nf4":
        options = {"init_lora_weights": "loftq", "loftq_config": qe.LoftQConfig(loftq_bits=4)}
    model = qe.get_peft_model(
        make_model("llama", dtype=dtype),
        qe.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **options),
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(1000):
        model.merge_adapter()
        model.unmerge_adapter()
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.slow
def test_the_same_bytes_whatever_the_threads(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    """Codes and scales of plain quantisation do not depend on the number of threads; factors may."""
    source = make_checkpoint("llama", hidden_size=256, intermediate_size=512)
    found = []
    for threads in ("1", "2", "4"):
        out = tmp_path / threads
        options = ("--method", "qlora", "--scales", "signed-mse", "--rank", 2, "--quiet")
        result = finish(start(source, out, *options, env={"OMP_NUM_THREADS": threads}))
        assert result.code == 0, result.err
        found.append((out / "model.safetensors").read_bytes())
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
def test_the_same_command_twice_gives_the_same_bytes(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    """In new processes, whose hashes of strings differ."""
    source = make_checkpoint("llama")
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six\n" * 200)
    found = []
    for seed in ("1", "2"):
        out = tmp_path / "out"
        options = ("--rank", 4, "--bits", 3, "--calibration", text, "--calibration-windows", 2, "--quiet")
        result = finish(start(source, out, *options, env={"PYTHONHASHSEED": seed}))
        assert result.code == 0, result.err
        kept = [path for path in sorted(out.rglob("*")) if path.is_file() and "report" not in path.name]
        found.append({path.name: path.read_bytes() for path in kept})
        subprocess.run([sys.executable, "-c", f"import shutil; shutil.rmtree({str(out)!r})"], check=True)
    assert found[0] == found[1]


def test_threads_change_no_quantisation() -> None:
    """In this process, for every format and rule."""
    script = (
        "import torch, hashlib; from quant import QuantSpec, formats, quantize\n"
        "from quant.tensor import SCALE_RULES\n"
        "w = torch.randn(96, 1024, generator=torch.Generator().manual_seed(0))\n"
        "for threads in (1, 3):\n"
        "    torch.set_num_threads(threads); h = hashlib.sha256()\n"
        "    for name in formats.names():\n"
        "        for rule in SCALE_RULES:\n"
        "            for nested in (False, True):\n"
        "                q = quantize(w, QuantSpec(name, 64, nested), scales=rule)\n"
        "                for t in q.state_dict().values(): h.update(t.numpy().tobytes())\n"
        "    print(h.hexdigest())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    one, three = done.stdout.split()
    assert one == three
