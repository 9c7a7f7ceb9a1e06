"""How the command is used: recipes, dry runs, JSON lines, plain output, hub ids."""

from __future__ import annotations

import importlib
import json
import os
import pty
import re
import shlex
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_engine.report import LayerReport, RunReport
from tests.cli.command import files, finish, invoke, start

MakeCheckpoint = Callable[..., Path]

RECIPES = {
    "recipe.toml": """
rank = 4
alpha = 8.0
bits = 3
double-quant = true
target-modules = ["q_proj", "down_proj"]
rank-pattern = {down_proj = 2}
save_format = "native"
""",
    "recipe.yaml": """
rank: 4
alpha: 8
bits: 3
double_quant: true
target-modules: [q_proj, down_proj]
rank-pattern: {down_proj: 2}
save-format: native
""",
    "recipe.json": json.dumps(
        {
            "rank": 4,
            "alpha": 8,
            "bits": 3,
            "double-quant": True,
            "target-modules": "q_proj,down_proj",
            "rank-pattern": ["down_proj=2"],
            "save-format": "native",
        }
    ),
}


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipe_is_the_command_line(tmp_path: Path, make_checkpoint: MakeCheckpoint, name: str) -> None:
    source = make_checkpoint("llama")
    (tmp_path / name).write_text(RECIPES[name])
    spelled = [
        "--rank",
        4,
        "--alpha",
        8,
        "--bits",
        3,
        "--double-quant",
        "--target-modules",
        "q_proj,down_proj",
    ]
    spelled += ["--rank-pattern", "down_proj=2", "--save-format", "native"]
    assert invoke(source, tmp_path / "a" / "out", *spelled).code == 0
    result = invoke(source, tmp_path / "b" / "out", "--config", tmp_path / name)
    assert result.code == 0, result.err
    one, two = files(tmp_path / "a"), files(tmp_path / "b")
    config = "out/loftq_init/adapter_config.json"
    assert {key: value for key, value in one.items() if key != config} == {
        key: value for key, value in two.items() if key != config
    }
    layers = RunReport.read(tmp_path / "b" / "out").layers
    assert {(layer.name.rpartition(".")[2], layer.rank, layer.scaling) for layer in layers} == {
        ("q_proj", 4, 2.0),
        ("down_proj", 2, 4.0),
    }


def test_command_line_wins(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    (tmp_path / "recipe.toml").write_text(
        'model = "nowhere"\nrank = 4\ndouble-quant = true\ninit = "qlora"\n'
    )
    arguments = ["--config", tmp_path / "recipe.toml", "--rank", 2, "--no-double-quant"]
    assert invoke(make_checkpoint("llama"), tmp_path / "out", *arguments).code == 0
    report = RunReport.read(tmp_path / "out")
    assert {(layer.rank, layer.double_quant) for layer in report.layers} == {(2, False)}
    assert report.run["options"]["method"] == "qlora"


def test_recipe_may_name_model_and_output(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    values = {"model": str(make_checkpoint("llama")), "out": str(tmp_path / "out"), "rank": 4, "quiet": True}
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    result = invoke("--config", tmp_path / "recipe.json")
    assert (result.code, result.out, result.err) == (0, "", "")
    RunReport.read(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "text", "contains"),
    [
        ("r.toml", "rnk = 4", "unknown option 'rnk' (did you mean 'rank'?)"),
        ("r.toml", "block-sise = 4", "unknown option 'block-sise' (did you mean 'block-size'?)"),
        ("r.yaml", "config: r.yaml", "unknown option 'config'"),
        ("r.yaml", "3: 4", "unknown option '3'"),
        ("r.toml", "rank = true", "'rank' is True; it must be not true or false"),
        ("r.toml", "overwrite = 1", "'overwrite' is 1; it must be true or false"),
        ("r.json", '{"rank": [1, 2]}', "'rank' takes one value, got 2"),
        ("r.json", '{"rank": "x"}', "'x' is not a valid integer"),
        ("r.json", '{"rank": null}', "'rank' is None; it must hold numbers and texts"),
        ("r.json", '{"rank-pattern": {"a": {"b": 1}}}', "is not a whole number"),
        ("r.json", '{"init": "loftq", "method": "qlora"}', "'method' is given twice"),
        ("r.json", "[1]", "must hold a table of options"),
        ("r.json", "{", "cannot be read"),
        ("r.toml", "rank =", "cannot be read"),
        ("r.yaml", "a: [1", "cannot be read"),
        ("r.yaml", "!!python/object/apply:os.system [id]", "cannot be read"),
        ("r.ini", "rank = 4", "must end in .toml, .yaml, .yml or .json"),
        (None, "", "no such file"),
    ],
)
def test_bad_recipes(tmp_path: Path, name: str | None, text: str, contains: str) -> None:
    path = tmp_path / (name or "missing.toml")
    if name is not None:
        path.write_text(text)
    message = invoke("model", tmp_path / "out", "--config", path).error()
    assert contains in message
    assert not (tmp_path / "out").exists()


def test_dry_run_writes_nothing(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    result = invoke(
        make_checkpoint("llama"), tmp_path / "out", "--rank", 4, "--dry-run", "--bits-pattern", "q_proj=8"
    )
    assert result.code == 0
    assert list(tmp_path.iterdir()) == []
    text = " ".join(result.out.split())
    assert "LlamaForCausalLM: 14 layers to quantise" in text
    assert "2 x model.layers.*.self_attn.q_proj 64x64 int8/64 4 1 16.4 kB 8.7 kB 4.1 kB" in text
    assert "whole model native, float16" in text
    assert "expected peak memory" in text
    assert "note: saved in the native format: bitsandbytes holds fp4 and nf4, not int8" in text


def test_names_that_are_no_modules_are_noted(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    """A name that matches nothing is passed over as PEFT does, but not in silence: once, with the remedy."""
    options = ["--target-modules", "q_proj,v_prj", "--exclude-modules", "k_prj", "--rank-pattern", "q_prj=2"]
    result = invoke(make_checkpoint("llama"), tmp_path / "out", "--rank", 4, "--dry-run", *options)
    assert [line for line in result.out.splitlines() if line.startswith("note:")] == [
        "note: --target-modules 'v_prj' is no module of this model (did you mean 'v_proj'?)",
        "note: --exclude-modules 'k_prj' is no module of this model (did you mean 'k_proj'?)",
        "note: --rank-pattern 'q_prj' matches no quantised module (did you mean 'q_proj'?)",
    ]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("save_format", ["bnb", "native", "dense"])
def test_dry_run_predicts_sizes(
    tmp_path: Path, make_checkpoint: MakeCheckpoint, name: str, save_format: str
) -> None:
    arguments = (make_checkpoint(name), tmp_path / "out", "--rank", 4, "--save-format", save_format, "--json")
    planned = json.loads(invoke(*arguments, "--dry-run").out)
    assert invoke(*arguments).code == 0
    report = RunReport.read(tmp_path / "out")
    tables = len(report.layers) * 220 if save_format == "bnb" else 0  # quant_map and quant_state
    assert planned["bytes_out"] <= report.bytes_out <= planned["bytes_out"] + tables
    assert [layer["bytes_out"] for layer in planned["layers"]] == [layer.bytes_out for layer in report.layers]
    assert sum(layer["adapter_bytes"] for layer in planned["layers"]) == report.adapter_bytes


def test_json_lines(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    result = invoke(make_checkpoint("llama"), tmp_path / "out", "--rank", 4, "--json")
    assert result.code == 0
    assert result.err == ""
    events = [json.loads(line) for line in result.out.splitlines()]
    assert [event["event"] for event in events] == ["plan", *["layer"] * 14, "done"]
    report = RunReport.read(tmp_path / "out")
    assert tuple(LayerReport.from_json(event) for event in events[1:-1]) == report.layers
    assert events[-1]["totals"] == report.totals
    assert events[-1]["out"] == str(tmp_path / "out")


def test_what_a_reader_sees_last(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    out = tmp_path / "out"
    result = invoke(make_checkpoint("llama"), out, "--rank", 4)
    assert "\x1b" not in result.out  # no terminal: no colours, no cursor movements
    assert result.err == ""
    assert "Worst of 14 layers" in result.out
    assert f"AutoModelForCausalLM.from_pretrained('{out}')" in result.out
    assert f"PeftModel.from_pretrained(model, '{out / 'loftq_init'}', is_trainable=True)" in result.out
    assert "qlora-merge" in result.out
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    native = invoke(make_checkpoint("llama"), tmp_path / "native", "--rank", 4, "--bits", 2)
    assert f"qe.from_pretrained('{tmp_path / 'native'}')" in native.out
    assert f"qe.PeftModel.from_pretrained(model, '{tmp_path / 'native' / 'loftq_init'}'" in native.out


@pytest.mark.parametrize(
    ("name", "options"), [("llama", ()), ("llama", ("--bits", 2)), ("bert", ()), ("gpt2", ("--bits", 8))]
)
def test_printed_next_steps_work_as_printed(
    tmp_path: Path,
    make_checkpoint: MakeCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: tuple[Any, ...],
) -> None:
    """The Python is run and the commands are called, copied from the output, for a folder with a space."""
    monkeypatch.chdir(tmp_path)
    shown = invoke(make_checkpoint(name), "my out", "--rank", 4, *options).out
    code, _, rest = shown.partition("To train it, in Python:\n")[2].partition("\n\n")
    if "from peft" in code:
        pytest.importorskip("peft")
        pytest.importorskip("bitsandbytes")
    names: dict[str, Any] = {}
    exec(textwrap.dedent(code), names)
    assert any(parameter.requires_grad for parameter in names["model"].parameters())
    Path("TEXTS.jsonl").write_text(
        "".join(json.dumps({"text": f"line {i} of a text"}) + "\n" for i in range(8))
    )
    commands = [shlex.split(line) for line in rest.splitlines() if line.startswith("    qlora-")]
    assert [command[0] for command in commands] == ["qlora-finetune"] * (name != "bert") + ["qlora-merge"]
    for program, *arguments in commands:
        module = importlib.import_module(f"qlora_engine.cli.{program.removeprefix('qlora-')}")
        with pytest.raises(SystemExit) as ended:
            module.main([*arguments, "--quiet"])
        assert not ended.value.code
    assert (tmp_path / "MERGED" / "config.json").is_file()


def on_a_terminal(*arguments: Any, **environment: str) -> str:
    """Everything that the real process writes to a terminal."""
    master, slave = pty.openpty()
    process = start(
        *arguments,
        env={"TERM": "xterm-256color", "COLUMNS": "100", **environment},
        stderr=slave,
        stdout=slave,
    )
    os.close(slave)
    text = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # how Linux says that the last writer has gone
            break
        if not piece:
            break
        text += piece
    assert process.wait() == 0, text
    os.close(master)
    return text.decode()


def test_terminal_and_no_color(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    source = make_checkpoint("llama")
    text = on_a_terminal(source, tmp_path / "out", "--rank", 4)
    assert "14/14" in text
    assert "ETA" in text
    assert re.search(r"model\.layers\.\d\.\S+ 0\.0\d+ -> 0\.0\d+ ", text)
    assert "\x1b[1m" in text or "\x1b[38" in text
    plain = on_a_terminal(source, tmp_path / "plain", "--rank", 4, NO_COLOR="1")
    assert not re.search(r"\x1b\[(?:\d+;)*[349][0-7]", plain)  # bold and cursor movements, no colours
    assert "14/14" in plain


def test_help_and_version() -> None:
    shown = invoke("--help")
    assert shown.code == 0
    for option in ("--bits", "--rank-pattern", "--save-format", "--resume", "--config", "Examples:"):
        assert option in shown.out
    assert invoke("-h").out == shown.out
    assert invoke("--version").out.startswith("loftq-init ")


@pytest.mark.parametrize("mode", [[], ["--json"]])
def test_reader_that_goes_away(tmp_path: Path, make_checkpoint: MakeCheckpoint, mode: list[str]) -> None:
    process = start(make_checkpoint("llama"), tmp_path / "out", "--rank", 4, *mode)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait() == 0
    RunReport.read(tmp_path / "out")


@pytest.fixture
def hub_cache(tmp_path: Path, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds the model tiny-org/tiny-llama, as huggingface_hub lays it out."""
    import huggingface_hub.constants

    repository = tmp_path / "cache" / "models--tiny-org--tiny-llama"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    for number, path in enumerate(sorted(make_checkpoint("llama", shard_size="60KB").iterdir())):
        shutil.copy(path, repository / "blobs" / f"{number:040d}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040d}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_hub_id_from_the_cache(tmp_path: Path, hub_cache: Path) -> None:
    result = finish(start("tiny-org/tiny-llama", tmp_path / "out", "--rank", 4, env={"HF_HUB_OFFLINE": "1"}))
    assert result.code == 0, result.err
    report = RunReport.read(tmp_path / "out")
    assert report.model == "tiny-org/tiny-llama"
    assert len(report.layers) == 14
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()


def test_hub_id_with_another_revision(tmp_path: Path, hub_cache: Path) -> None:
    message = invoke("tiny-org/tiny-llama", tmp_path / "out", "--revision", "other").error()
    assert "the hub's cache lacks it and the hub cannot be reached" in message
