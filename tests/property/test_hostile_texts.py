"""Configs, recipes, data and reports from strangers; no code, no pickle and no network among what they do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qlora_engine as qe
from qlora_engine.cli import common
from qlora_engine.disk_adapter import DiskAdapter
from qlora_engine.errors import InputError
from qlora_engine.texts import load_texts
from qlora_engine.training.data import RowEncoder, Rows
from tests.property.hostile import in_time, mutated, no_network_no_pickle, only, text_of, torn  # noqa: F401

MakeCheckpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def quantised(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised model with its adapter and its report."""
    from tests.cli.command import invoke

    out = tmp_path_factory.mktemp("quantised") / "out"
    assert invoke(make_checkpoint("llama"), out, "--rank", 2, "--quiet").code == 0
    return out


# ---- adapter_config.json


@settings(max_examples=250)
@given(data=st.data())
def test_adapter_config(data: Any, quantised: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "adapter"
    if not folder.exists():
        shutil.copytree(quantised / "loftq_init", folder)
    config = json.loads((quantised / "loftq_init" / "adapter_config.json").read_text())
    raw = (
        text_of(data.draw(mutated(config)))
        if data.draw(st.integers(0, 4))
        else data.draw(torn(text_of(config)))
    )
    (folder / "adapter_config.json").write_bytes(raw)
    with only():
        DiskAdapter.open(folder)
    with only(ValueError, TypeError, KeyError, AttributeError):  # PEFT's own types of error, for scripts
        qe.LoraConfig.from_pretrained(folder)


@pytest.mark.parametrize("pattern", ["(a|a)+$", "(.*)*x", "([a-z_.0-9]+)+!", "(x+x+)+y"])
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_backtracks_is_refused(
    field: str, pattern: str, quantised: Path, tmp_path: Path
) -> None:
    """These take longer than the universe lasts on module names of 30 letters."""
    folder = tmp_path / "adapter"
    shutil.copytree(quantised / "loftq_init", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config[field] = {pattern: 2}
    (folder / "adapter_config.json").write_bytes(text_of(config))
    with pytest.raises(InputError, match=r"could take for ever"), in_time():
        DiskAdapter.open(folder)


# ---- recipes


RECIPE = {
    "rank": 8,
    "bits-pattern": {"mlp": 3, "v_proj": "nf4/64"},
    "target-modules": ["q_proj"],
    "double-quant": True,
}


def command() -> Any:
    from qlora_engine.cli.loftq_init import command

    return command


@settings(max_examples=250)
@given(data=st.data())
def test_recipe(data: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    import yaml

    ending = data.draw(st.sampled_from(["json", "toml", "yaml"]))
    recipe = data.draw(mutated(RECIPE))
    raw = text_of(recipe)
    if ending == "yaml":
        raw = yaml.safe_dump(recipe, allow_unicode=False).encode("utf-8", "replace")
    if ending == "toml" or data.draw(st.booleans()):
        raw = data.draw(
            torn(b'rank = 8\ntarget-modules = ["q"]\n[bits-pattern]\nmlp = 3\n' if ending == "toml" else raw)
        )
    path = tmp_path_factory.getbasetemp() / f"recipe.{ending}"
    path.write_bytes(raw)
    with only():
        common.recipe_defaults(common.read_recipe(path), command())


BOMBS = {
    "laughs": "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefghi", "bcdefghij"))
    + "rank: *j\n",
    "code": "rank: !!python/object/apply:os.system ['touch /tmp/owned']\n",
    "merge": "x: &x {rank: 3}\n<<: *x\n",
    "deep": "[" * 20_000,
    "keys": "? [a, b]\n: 3\n? {a: b}\n: 4\n",
}


@pytest.mark.parametrize("name", BOMBS)
def test_yaml_bombs(name: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(BOMBS[name])
    with pytest.raises(InputError), in_time():
        common.recipe_defaults(common.read_recipe(path), command())


# ---- data


ROWS = [
    {"text": "one two three"},
    {"prompt": "a b", "completion": " c"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    {"input_ids": [1, 2, 3, 4], "attention_mask": [1, 1, 1, 0]},
]
LINES = [
    b"[" * 100_000,
    b'{"text": ' + b"9" * 5000 + b"}",
    b'{"text": "\\ud800 lone"}',
    b'{"prompt": "a", "completion": "\\udfff b c"}',
    b'{"messages": [{"role": "\\ud800", "content": "x"}, {"role": "assistant", "content": "\\ud800"}]}',
    b'{"input_ids": [99999999999999999999, 1]}',
    b'{"input_ids": [-1, 123456, 3]}',
    b'{"input_ids": [[1, 2], [3]]}',
    b'{"input_ids": [[[1]]]}',
    b'{"input_ids": []}',
    b'{"text": "\x00\x01 null"}',
    b"\xff\xfe{}",
    b"NaN",
    b'{"text": "' + b"a" * 200_000 + b'"}',
]


def read_all(path: Path, tokenizer: Any) -> None:
    with only():
        rows = Rows(path, RowEncoder(tokenizer, 32))
        for number in range(len(rows)):
            assert 2 <= len(rows[number].ids) <= 32
    with only():
        for window in load_texts(path, tokenizer, window=16):
            assert window.dtype == torch.int64


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_data_rows(
    data: Any, make_tokenizer: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    lines = data.draw(st.lists(st.sampled_from(ROWS).flatmap(mutated).map(text_of), min_size=1, max_size=4))
    raw = b"\n".join(lines)
    path.write_bytes(raw if data.draw(st.booleans()) else data.draw(torn(raw)))
    read_all(path, _tokenizer(make_tokenizer))


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("ending", ["jsonl", "txt"])
def test_bad_lines(line: bytes, ending: str, make_tokenizer: Callable[[], Any], tmp_path: Path) -> None:
    path = tmp_path / f"data.{ending}"
    path.write_bytes(line + b"\n")
    read_all(path, _tokenizer(make_tokenizer))


_made: list[Any] = []


def _tokenizer(make: Callable[[], Any]) -> Any:
    if not _made:
        _made.append(make())
    return _made[0]


# ---- reports


@settings(max_examples=100)
@given(data=st.data())
def test_report(data: Any, quantised: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Read, then shown in every way."""
    from qlora_engine.cli import report as program

    folder = tmp_path_factory.getbasetemp() / "reported"
    folder.mkdir(exist_ok=True)
    report = json.loads((quantised / "report.json").read_text())
    report["layers"] = report["layers"][:2]
    (folder / "report.json").write_bytes(text_of(data.draw(mutated(report))))
    with only():
        target = data.draw(
            st.sampled_from([(), ("--html", "page.html"), ("--csv", "table.csv"), ("--json",)])
        )
        words = [str(folder / word) if "." in word else word for word in target]
        program.command.main([str(folder), *words], standalone_mode=False)


# ---- code, pickles, network


def hostile_model(make_checkpoint: MakeCheckpoint, folder: Path) -> Path:
    """A model whose every file that may name code does, in files that leave a mark when they run."""
    shutil.copytree(make_checkpoint("llama"), folder)
    mark = folder.parent / "ran"
    code = f"open({str(mark)!r}, 'w').close()\nfrom transformers import *\n"
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil"):
        (folder / f"{name}.py").write_text(code)
    for file, classes in (
        ("config.json", {"AutoConfig": "configuration_evil.LlamaConfig"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "tokenization_evil.LlamaTokenizer"]}),
    ):
        config = json.loads((folder / file).read_text())
        config["auto_map"] = {**classes, "AutoModelForCausalLM": "modeling_evil.LlamaForCausalLM"}
        config["custom_pipelines"] = {"x": {"impl": "modeling_evil.X"}}
        config.pop("tokenizer_class", None)
        (folder / file).write_bytes(text_of(config))
    return folder


def test_no_code_runs_unasked(
    make_checkpoint: MakeCheckpoint,
    quantised: Path,
    tmp_path: Path,
    no_network_no_pickle: Callable[[], int],  # noqa: F811
) -> None:
    from tests.cli.command import invoke
    from tests.cli.test_finetune import invoke as finetune
    from tests.cli.test_merge import invoke as merge

    folder = hostile_model(make_checkpoint, tmp_path / "model")
    (tmp_path / "text.txt").write_text("one two three four five\n" * 100)
    for result in (
        invoke(folder, tmp_path / "a", "--rank", 2, "--quiet"),
        invoke(folder, tmp_path / "b", "--rank", 2, "--calibration", tmp_path / "text.txt", "--quiet"),
        merge(folder, quantised / "loftq_init", tmp_path / "c", "--quiet"),
    ):
        assert result.code in (0, 2)
        assert "Traceback" not in result.err
    status, _, err = finetune(
        folder, "--data", tmp_path / "text.txt", "--output", tmp_path / "d", "--max-steps", 1
    )
    assert status in (0, 2), err
    with only(ValueError):
        qe.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()
    assert no_network_no_pickle() == 0
    assert not list(tmp_path.glob("[abc]/*.py"))  # code is not carried along either


def test_nothing_asks_the_network_or_a_pickle(
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_network_no_pickle: Callable[[], int],  # noqa: F811
) -> None:
    """Every command on folders, with the hub's offline switch off."""
    from tests.cli.command import invoke
    from tests.cli.test_finetune import invoke as finetune
    from tests.cli.test_merge import invoke as merge

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    model, out, text = make_checkpoint("llama"), tmp_path / "out", tmp_path / "text.txt"
    text.write_text("one two three four five\n" * 100)
    done = invoke(model, out, "--rank", 2, "--calibration", text, "--calibration-windows", 2, "--quiet")
    assert done.code == 0, done.err
    done = merge(out, out / "loftq_init", tmp_path / "merged", "--quiet")
    assert done.code == 0, done.err
    options = ("--max-steps", 1, "--max-length", 16, "--quiet")
    status, _, err = finetune(out, "--data", text, "--output", tmp_path / "adapter", *options)
    assert status == 0, err
    qe.PeftModel.from_pretrained(qe.from_pretrained(out), tmp_path / "adapter")
    assert no_network_no_pickle() == 0
