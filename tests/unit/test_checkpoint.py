"""A checkpoint folder: found, checked, refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_engine.checkpoint import (
    INDEX_FILE,
    WEIGHTS_FILE,
    Checkpoint,
    is_inside,
    natural_order,
    parse_size,
    shard_names,
    split_shards,
)
from qlora_engine.errors import InputError


@pytest.fixture
def folder(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> Path:
    """A sharded checkpoint that a test may damage."""
    return Path(shutil.copytree(make_checkpoint("llama", shard_size="60KB"), tmp_path / "model"))


def edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    change(index)
    (folder / INDEX_FILE).write_text(json.dumps(index))


@pytest.mark.parametrize("shard_size", ["5GB", "60KB"])
def test_open_finds_every_tensor(make_checkpoint: Callable[..., Path], shard_size: str) -> None:
    folder = make_checkpoint("llama", shard_size=shard_size)
    checkpoint = Checkpoint.open(folder)
    expected: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        expected |= load_file(path)
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(checkpoint.tensors[name].read(), value) for name, value in expected.items())
    assert list(checkpoint.tensors) == sorted(expected, key=natural_order)
    assert checkpoint.float_dtype == "F16"
    assert checkpoint.nbytes == sum(value.nbytes for value in expected.values())
    assert [str(path) for path in checkpoint.side_files()] == [
        name
        for name in sorted(os.listdir(folder))
        if name
        in ("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    ]


def test_open_refuses_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"not a model: it has no config.json"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"neither model.safetensors nor"):
        Checkpoint.open(tmp_path)
    (tmp_path / "other.safetensors").write_text("")
    with pytest.raises(InputError, match=r"it has other\.safetensors"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(InputError, match=r"pickled weights \(pytorch_model.bin\).*save_pretrained"):
        Checkpoint.open(tmp_path)


def test_open_names_the_missing_shard(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(InputError, match=f"names the shard {shard.name}, which is not in"):
        Checkpoint.open(folder)


def test_open_names_tensors_that_no_shard_has(folder: Path) -> None:
    edit_index(folder, lambda index: index["weight_map"].update(ghost=shard_names(2)[0]))
    edit_index(
        folder, lambda index: index["weight_map"].update(ghost=next(iter(index["weight_map"].values())))
    )
    with pytest.raises(InputError, match="1 tensors of the index are in no shard, among them 'ghost'"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        ".",
        "",
        "a\0b",
        "..\\b",
        7,
        None,
        ["x"],
    ],
)
def test_open_refuses_shard_names_that_lead_elsewhere(folder: Path, name: Any) -> None:
    (folder.parent / "outside.safetensors").write_bytes((folder / shard_path(folder)).read_bytes())
    edit_index(folder, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    with pytest.raises(InputError, match="is not a plain file name"):
        Checkpoint.open(folder)


def shard_path(folder: Path) -> str:
    return sorted(path.name for path in folder.glob("*.safetensors"))[0]


@pytest.mark.parametrize(
    "index",
    ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[]", "{", '{"weight_map": {"a": "x", "a": "y"}}'],
)
def test_open_refuses_a_bad_index(folder: Path, index: str) -> None:
    (folder / INDEX_FILE).write_text(index)
    with pytest.raises(InputError, match=INDEX_FILE):
        Checkpoint.open(folder)


def test_open_refuses_links_out_of_the_folder(folder: Path) -> None:
    shard = folder / shard_path(folder)
    shutil.move(shard, folder.parent / "elsewhere")
    shard.symlink_to(folder.parent / "elsewhere")
    with pytest.raises(InputError, match=r"is a link to .*elsewhere, outside the folder"):
        Checkpoint.open(folder)


def test_side_files_refuses_links_out_of_the_folder(folder: Path) -> None:
    (folder.parent / "secret").write_text("x")
    (folder / "tokenizer_link.json").symlink_to(folder.parent / "secret")
    with pytest.raises(InputError, match=r"tokenizer_link.json is a link to .*secret"):
        list(Checkpoint.open(folder).side_files())


def test_open_follows_the_links_of_the_hub_cache(
    tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    repository = tmp_path / "models--x--y"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(make_checkpoint("llama").iterdir())):
        shutil.copy(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert Checkpoint.open(snapshot).tensors
    assert is_inside(snapshot / "config.json", snapshot)
    assert not is_inside(repository / "blobs" / "0", tmp_path / "other")


def test_open_refuses_a_tensor_in_two_shards(folder: Path) -> None:
    first = folder / shard_path(folder)
    shutil.copy(first, folder / "extra.safetensors")
    name = next(iter(load_file(first)))
    edit_index(folder, lambda index: index["weight_map"].pop(name))
    edit_index(folder, lambda index: index["weight_map"].update({f"{name}": "extra.safetensors"}))
    checkpoint = Checkpoint.open(folder)  # the index decides
    assert checkpoint.tensors[name].path.name == "extra.safetensors"
    edit_index(folder, lambda index: [index["weight_map"].pop(key) for key in load_file(first)])
    edit_index(folder, lambda index: index["weight_map"].update(a=first.name, b="extra.safetensors"))
    with pytest.raises(InputError, match="is in both"):
        Checkpoint.open(folder)


def test_identity_changes_with_the_input(folder: Path) -> None:
    before = Checkpoint.open(folder).identity()
    assert Checkpoint.open(folder).identity() == before
    shard = folder / shard_path(folder)
    facts = shard.stat()
    os.utime(shard, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    after = Checkpoint.open(folder).identity()
    assert [name for name in before if before[name] != after[name]] == [shard.name]


def test_natural_order() -> None:
    names = ["a.10.b", "a.2.b", "a.2.a", "a.b", "b", "a.2"]
    assert sorted(names, key=natural_order) == ["a.2", "a.2.a", "a.2.b", "a.10.b", "a.b", "b"]
    assert sorted(["a." + "9" * 5000, "a.10", "a.x"], key=natural_order)[0] == "a.10"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("1.5 MB", 1_500_000),
        ("2GiB", 2 << 30),
        ("64k", 64_000),
        ("7", 7),
        (9, 9),
        ("1B", 1),
    ],
)
def test_parse_size(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "0", "1XB", "1 G B", "nan", "0.1B"])
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(InputError, match="is not a size"):
        parse_size(text)


def test_split_shards() -> None:
    assert split_shards([], 10) == [[]]
    assert split_shards([4, 4, 4, 20, 1, 9, 1], 10) == [[0, 1], [2], [3], [4, 5], [6]]


def test_shard_names() -> None:
    assert shard_names(1) == [WEIGHTS_FILE]
    assert shard_names(2) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
