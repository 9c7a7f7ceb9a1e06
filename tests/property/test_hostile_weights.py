"""Weight files and what describes them, from strangers: headers, indices, adapters, calibrations."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_engine.calibration_result import Calibration, LayerInputs
from qlora_engine.checkpoint import INDEX_FILE, Checkpoint
from qlora_engine.errors import InputError
from qlora_engine.fingerprint import Fingerprint
from qlora_engine.safetensors_io import read_header
from quant import QuantSpec, quantize
from quant.bnb_format import from_bnb, to_bnb
from tests.property.hostile import mutated, no_network_no_pickle, only, text_of, torn  # noqa: F401

MakeCheckpoint = Callable[..., Path]
HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "U8", "shape": [], "data_offsets": [32, 33]},
}


def write_raw(path: Path, header: bytes, data: bytes) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


@settings(max_examples=300)
@given(header=mutated(HEADER))
def test_header(header: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write_raw(tmp_path_factory.getbasetemp() / "fuzzed.safetensors", text_of(header), bytes(33))
    with only():
        entries, metadata = read_header(path)
        assert all(isinstance(value, str) for value in metadata.values())
        size = path.stat().st_size
        for entry in entries.values():  # what was accepted lies in the file and can be read
            assert 0 <= entry.begin <= entry.begin + entry.nbytes <= size
            assert entry.read().numel() == entry.numel


@settings(max_examples=300)
@given(data=torn(len(text_of(HEADER)).to_bytes(8, "little") + text_of(HEADER) + bytes(33)))
def test_torn_file(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "torn.safetensors"
    path.write_bytes(data)
    with only():
        for entry in read_header(path)[0].values():
            entry.read()


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":[' + b"[]," * 3_000_000 + b"[]]}",
        b'{"a":{' + b",".join(b'"%d":{}' % i for i in range(2_000_000)) + b"}}",
        b'{"a":' + b"[" * 5_000_000,
        b"{" + b'"":0,' * 3_000_000 + b'"":0}',
    ],
    ids=["lists", "objects", "depth", "pairs"],
)
def test_a_hostile_header_takes_little_memory(header: bytes, tmp_path: Path) -> None:
    """Python's objects for a JSON text may take 30 times its bytes; they are not made for these."""
    path = write_raw(tmp_path / "a.safetensors", header, b"")
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="not a valid safetensors file"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(header)
    finally:
        tracemalloc.stop()


def test_a_header_longer_than_its_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="truncated, or not safetensors"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@settings(max_examples=150)
@given(data=st.data())
def test_index(data: Any, make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "indexed"
    if not folder.exists():
        shutil.copytree(make_checkpoint("llama", shard_size="60KB"), folder)
        (folder.parent / "outside.safetensors").write_bytes(b"")
    source = json.loads((make_checkpoint("llama", shard_size="60KB") / INDEX_FILE).read_text())
    index = data.draw(mutated(source) | mutated(source).map(lambda found: found.get("weight_map")))
    (folder / INDEX_FILE).write_bytes(text_of(index))
    with only():
        found = Checkpoint.open(folder)
        assert all(shard.resolve().parent == folder.resolve() for shard in found.shards)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/hostname", "a/b", "..", ".", "", "a\\b", "a\0b", 3]
)
def test_no_shard_outside_the_folder(name: Any, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(make_checkpoint("llama", shard_size="60KB"), folder)
    (tmp_path / "outside.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (folder / INDEX_FILE).write_bytes(text_of(index))
    with pytest.raises(InputError, match="not a plain file name in the same folder"):
        Checkpoint.open(folder)


def test_no_link_out_of_the_folder(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(make_checkpoint("llama", shard_size="60KB"), folder)
    shard = sorted(folder.glob("*.safetensors"))[0]
    shutil.move(shard, tmp_path / "outside.safetensors")
    shard.symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(InputError, match="outside the folder"):
        Checkpoint.open(folder)


@pytest.fixture(scope="module")
def bnb_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return to_bnb("w", quantize(torch.randn(32, 64), QuantSpec("nf4", 64, double_quant=True)))


@settings(max_examples=200)
@given(data=st.data())
def test_bnb_quant_state(data: Any, bnb_tensors: dict[str, torch.Tensor]) -> None:
    key = next(name for name in bnb_tensors if "quant_state" in name)
    state = json.loads(bytes(bnb_tensors[key].numpy()))
    raw = data.draw(mutated(state).map(text_of) | torn(text_of(state)))
    tensors = bnb_tensors | {key: torch.frombuffer(bytearray(raw or b" "), dtype=torch.uint8)}
    with only(ValueError):
        from_bnb("w", tensors).dequantize()


@pytest.fixture(scope="module")
def fingerprint() -> dict[str, Any]:
    q = quantize(torch.ones(2, 64), QuantSpec("nf4"))
    return Fingerprint({"a.b": q.spec}, {"a.b": "0123456789abcdef"}, "float16").to_dict()


@settings(max_examples=150)
@given(data=st.data())
def test_fingerprint(data: Any, fingerprint: dict[str, Any]) -> None:
    with only(ValueError):
        found = Fingerprint.from_dict(data.draw(mutated(fingerprint)))
        assert found.differences(found) == []


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    H = torch.eye(6)
    layers = {name: LayerInputs(500, 6, "full", stored="a", weight_shape=(4, 6)) for name in ("a", "b")}
    path = tmp_path_factory.mktemp("calibration") / "c.safetensors"
    Calibration(layers, {"a": H}, names={"disk": "a"}, means={"a": torch.ones(6)}).save(path)
    return path


@settings(max_examples=200)
@given(data=st.data())
def test_calibration(data: Any, calibration: Path) -> None:
    raw = calibration.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    if data.draw(st.booleans()):
        facts = data.draw(mutated(json.loads(header["__metadata__"]["calibration"])))
        header["__metadata__"]["calibration"] = json.dumps(facts)
    else:
        header = data.draw(mutated(header))
    path = write_raw(calibration.with_name("fuzzed.safetensors"), text_of(header), raw[8 + length :])
    with only():
        found = Calibration.load(path)
        for name in ("a", "disk"):
            if found.problem(name) is None:
                H = found.hessian(name, torch.ones(4, 6))
                assert H is None or H.shape[-1] == 6
                found.summary()
                found.sensitivity(name)


@settings(max_examples=60)
@given(data=st.data())
def test_quantization_config(
    data: Any, make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Both loaders: the model's, and the merger's."""
    from qlora_engine.architecture import read_architecture
    from qlora_engine.base_on_disk import DiskBase
    from qlora_engine.loading import from_pretrained
    from tests.cli.command import invoke

    name = data.draw(st.sampled_from(["bnb", "native"]))
    folder = tmp_path_factory.getbasetemp() / f"quantised-{name}"
    if not folder.exists():
        done = invoke(
            make_checkpoint("llama"), folder, "--rank", 2, "--bits", 4 if name == "bnb" else 3, "--quiet"
        )
        assert done.code == 0, done.err
        shutil.copy(folder / "config.json", folder / "whole.json")
    config = json.loads((folder / "whole.json").read_text())
    config["quantization_config"] = data.draw(mutated(config["quantization_config"]))
    (folder / "config.json").write_bytes(text_of(config))
    with only():
        checkpoint = Checkpoint.open(folder)
        DiskBase.open(checkpoint, read_architecture(folder, checkpoint.config))
    with only():
        from_pretrained(folder)
