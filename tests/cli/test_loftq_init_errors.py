"""Bad input: one line that says what was given and what is allowed, status 2, nothing written."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.command import finish, invoke, start

MakeCheckpoint = Callable[..., Path]


@pytest.fixture
def model(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> Path:
    """A copy of a sharded checkpoint that a test may damage."""
    return Path(shutil.copytree(make_checkpoint("llama", shard_size="60KB"), tmp_path / "model"))


def refuse(folder: Path, *arguments: Any, contains: str) -> None:
    """The command must fail with one line that contains a text, and change nothing in ``folder``."""
    before = sorted(str(path) for path in folder.rglob("*"))
    message = invoke(*arguments).error()
    assert contains in message
    assert sorted(str(path) for path in folder.rglob("*")) == before


def shard(model: Path, number: int = 1) -> Path:
    return sorted(model.glob("*.safetensors"))[number]


def edit_json(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_no_such_folder(tmp_path: Path) -> None:
    refuse(
        tmp_path, tmp_path / "nowhere", tmp_path / "out", contains=f"no such folder: {tmp_path / 'nowhere'}"
    )


def test_hub_id_that_is_not_cached(tmp_path: Path) -> None:
    refuse(
        tmp_path,
        "no-such-org/no-such-model",
        tmp_path / "out",
        contains="no folder named no-such-org/no-such-model",
    )


def test_a_file(tmp_path: Path, model: Path) -> None:
    refuse(tmp_path, model / "config.json", tmp_path / "out", contains="is a file; give the folder")


def test_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refuse(tmp_path, tmp_path / "empty", tmp_path / "out", contains="is not a model: it has no config.json")


@pytest.mark.parametrize(
    ("changes", "contains"),
    [
        ({"model_type": "nonsense"}, "model_type is 'nonsense'"),
        ({"model_type": None}, "model_type is None"),
        ({"architectures": ["NoSuchClass"]}, "has no class NoSuchClass"),
        ({"hidden_size": "wide"}, "cannot build a model from"),
        ({"num_hidden_layers": 10**9}, "at most 10000 layers"),
        ({"hidden_size": 128}, "config.json calls for"),
        ({"num_hidden_layers": 3}, "lacks the tensor 'model.layers.2."),
        ({"model_type": "nonsense", "auto_map": {"AutoConfig": "x.Y"}}, "pass --trust-remote-code"),
        ({"quantization_config": {"quant_method": "fp8"}}, "is quantised already ('fp8')"),
    ],
)
def test_bad_config(tmp_path: Path, model: Path, changes: dict[str, Any], contains: str) -> None:
    edit_json(model / "config.json", **changes)
    refuse(tmp_path, model, tmp_path / "out", "--rank", 4, contains=contains)


def test_config_that_is_no_json(tmp_path: Path, model: Path) -> None:
    (model / "config.json").write_text('{"model_type": ')
    refuse(tmp_path, model, tmp_path / "out", contains="is not valid JSON")


def test_missing_shard(tmp_path: Path, model: Path) -> None:
    name = shard(model).name
    shard(model).unlink()
    refuse(tmp_path, model, tmp_path / "out", contains=f"names the shard {name}, which is not in")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_shard(tmp_path: Path, model: Path, keep: int) -> None:
    data = shard(model).read_bytes()
    shard(model).write_bytes(data[:keep])
    refuse(tmp_path, model, tmp_path / "out", contains="is not a valid safetensors file")


@pytest.mark.parametrize("length", [0, 2**62, 10**8])
def test_corrupt_header_length(tmp_path: Path, model: Path, length: int) -> None:
    data = shard(model).read_bytes()
    shard(model).write_bytes(struct.pack("<Q", length) + data[8:])
    refuse(tmp_path, model, tmp_path / "out", contains="is not a valid safetensors file")


def test_names_of_strangers_stay_on_one_line(tmp_path: Path, model: Path) -> None:
    header = json.dumps({"a\nb\x1b[31m": {"dtype": "F32", "shape": [1], "data_offsets": [0, 9]}}).encode()
    shard(model).write_bytes(struct.pack("<Q", len(header)) + header)
    message = invoke(model, tmp_path / "out").error()
    assert "tensor 'a b [31m' lies at bytes 0 to 9 of 0" in message


def test_shard_outside_the_folder(tmp_path: Path, model: Path) -> None:
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../model/" + shard(model).name
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(tmp_path, model, tmp_path / "out", contains="is not a plain file name in the same folder")


def test_a_tokenizer_that_is_a_link_to_nothing(tmp_path: Path, model: Path) -> None:
    """As after a download into the hub's cache that was cut off."""
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").symlink_to("../../blobs/gone")
    refuse(tmp_path, model, tmp_path / "out", contains="is a link to ../../blobs/gone, which is not there")


def test_pickle(tmp_path: Path, model: Path) -> None:
    for path in [*model.glob("*.safetensors"), model / "model.safetensors.index.json"]:
        path.unlink()
    torch.save({}, model / "pytorch_model.bin")
    refuse(tmp_path, model, tmp_path / "out", contains="holds pickled weights (pytorch_model.bin)")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, make_model: Callable[..., Any], value: float) -> None:
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    model.save_pretrained(tmp_path / "model")
    refuse(
        tmp_path, tmp_path / "model", tmp_path / "out", "--rank", 4,
        contains="weight 'model.layers.1.mlp.up_proj.weight' (96, 64) has 1 elements that are NaN or inf",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "contains"),
    [
        (
            ["--rank", 33],
            "rank 33 is too large for 'model.layers.0.self_attn.k_proj' of shape (32, 64): at most 32",
        ),
        (["--rank", 0], "rank 0; a rank is an integer of at least 1"),
        (["--rank", "many"], "Invalid value for '--rank': 'many' is not a valid integer"),
        (["--alpha", -1], "alpha -1.0; it must be a positive number"),
        (["--alpha", "nan"], "it must be a positive number"),
        (["--iters", 0], "iters 0; it must be an integer of at least 1"),
        (["--bits", 5], "--bits 5; allowed: 2, 3, 4, 8"),
        (["--bits", 4, "--format", "nf4"], "--bits 4 and --format nf4: give one of them"),
        (["--format", "nf5"], "format 'nf5' (did you mean 'nf4'?); allowed: "),
        (["--block-size", 48], "block_size 48 is not a power of two"),
        (
            ["--scales", "signed"],
            "scales 'signed' (did you mean 'signed-mse'?); allowed: absmax, mse, signed-mse",
        ),
        (["--init", "loft"], "method 'loft' (did you mean 'loftq'?); allowed: "),
        (["--svd", "slow"], "allowed: fast, exact"),
        (["--dtype", "fp16"], "allowed: auto, float16, bfloat16, float32"),
        (["--device", "tpu"], "device 'tpu'; allowed: auto, cpu, cuda, cuda:N"),
        (["--device", "cuda:7"], "device 'cuda:7' is not there"),
        (["--max-shard-size", "big"], "'big' is not a size"),
        (["--save-format", "gguf"], "allowed: auto, bnb, native, dense"),
        (["--bits", 3, "--save-format", "bnb"], "choose --save-format native or dense"),
        (["--block-size", 16, "--save-format", "bnb"], "choose --save-format native or dense"),
        (["--target-modules", "embed_tokens", "--save-format", "bnb"], "bitsandbytes holds no embeddings"),
        (["--target-modules", "query"], "this model has embed_tokens, q_proj, k_proj"),
        (["--target-modules", "qproj"], "'qproj' is no module of this model (did you mean 'q_proj'?)"),
        (["--target-modules", ".*(q_proj"], "is not a regular expression"),
        (["--target-modules", "mlp"], "module 'model.layers.0.mlp' is a other"),
        (["--exclude-modules", ".*"], "All modules were excluded"),
        (["--target-modules", "a.*", "--target-modules", "b"], "give names, or one regular expression"),
        (["--rank-pattern", "q_proj"], "is not of the form REGEX=VALUE"),
        (["--rank-pattern", "q_proj=x"], "'x' is not a whole number"),
        (["--rank-pattern", "q=1", "--rank-pattern", "q=2"], "gives 'q' twice"),
        (["--rank-pattern", "q_proj=0"], "rank-pattern q_proj=0; a rank is an integer"),
        (["--bits-pattern", "q_proj=7"], "7 bits; allowed: 2, 3, 4, 8"),
        (["--bits-pattern", "q_proj=nf4/x"], "block size 'x' in 'nf4/x' is not a number"),
        (["--revision", "main"], "--revision main is for models of the hub"),
        (["--no-such-option"], "No such option"),
        (["a", "b"], "Got unexpected extra argument"),
    ],
)
def test_bad_options(tmp_path: Path, model: Path, arguments: list[Any], contains: str) -> None:
    refuse(tmp_path, model, tmp_path / "out", *arguments, contains=contains)


def test_missing_arguments(tmp_path: Path) -> None:
    refuse(tmp_path, contains="Missing argument 'MODEL'. (see loftq-init --help)")


def test_tied_weights_are_not_quantised(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    source = make_checkpoint("llama_tied")
    for name, other in (("lm_head", "model.embed_tokens"), ("embed_tokens", "lm_head")):
        message = invoke(source, tmp_path / "out", "--target-modules", name).error()
        assert f"shares its weight with {other}" in message


def test_output_exists(tmp_path: Path, model: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    refuse(
        tmp_path,
        model,
        tmp_path / "out",
        contains="exists and is not empty; give another folder, or --overwrite",
    )
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"
    (tmp_path / "file").write_text("x")
    refuse(tmp_path, model, tmp_path / "file", "--overwrite", contains="exists and is not a folder")
    refuse(tmp_path, model, tmp_path / "file" / "out", contains="is not a folder")


def test_output_is_the_model(tmp_path: Path, model: Path) -> None:
    for out in (model, tmp_path, tmp_path / "other" / ".." / "model"):
        refuse(tmp_path, model, out, "--overwrite", contains="is or contains the model")
    link = tmp_path / "link"
    link.symlink_to(model)
    refuse(tmp_path, model, link, "--overwrite", contains="is or contains the model")


def test_output_is_the_current_folder(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output takes its folder's place: a shell that stands there, or below, would stand nowhere."""
    (tmp_path / "here" / "below").mkdir(parents=True)
    for here, out in (("here", "."), ("here/below", "..")):
        monkeypatch.chdir(tmp_path / here)
        refuse(tmp_path, model, out, "--overwrite", contains="the current folder and would be replaced")


def test_a_name_that_is_too_long(tmp_path: Path, model: Path) -> None:
    refuse(tmp_path, model, tmp_path / ("n" * 250), contains="File name too long")
    refuse(tmp_path, model, tmp_path / ("n" * 300), contains="File name too long")


def test_home_is_found_without_a_shell(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert invoke("~/model", "~/out", "--rank", 4, "--quiet").code == 0
    assert (tmp_path / "out" / "config.json").is_file()
    assert not (tmp_path / "~").exists()
    refuse(tmp_path, "~nobody/model", "out2", contains="no such folder: ~nobody/model")


def test_why_there_is_no_tokenizer(tmp_path: Path, model: Path) -> None:
    """The reason begins on a line that ends with a colon."""
    for path in model.glob("*token*"):
        path.unlink()
    (tmp_path / "texts.txt").write_text("some text")
    options = ("--rank", 4, "--calibration", tmp_path / "texts.txt")
    message = invoke(model, tmp_path / "out", *options).error()
    assert "has no tokenizer to read texts with: " in message
    assert not message.endswith(":")


def test_unwritable(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "/proc" in invoke(model, "/proc/out", "--rank", 4).error()
    # Permissions do not bind root, who runs the tests in a container: say that the folder is closed.
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode, **kw: Path(path) != tmp_path and real(path, mode, **kw)
    )
    refuse(tmp_path, model, tmp_path / "a" / "out", contains=f"no permission to create files in {tmp_path}")


def test_errors_of_the_real_process(tmp_path: Path) -> None:
    result = finish(start(tmp_path / "nowhere", tmp_path / "out"))
    assert result.error() == f"no such folder: {tmp_path / 'nowhere'} (and it is not a hub id like ORG/NAME)"


def test_a_bug_keeps_its_traceback(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("qlora_engine.pipeline.solve_layer", broken)
    with pytest.raises(ZeroDivisionError, match="ours"):
        invoke(model, tmp_path / "out", "--rank", 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
