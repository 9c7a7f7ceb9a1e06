"""``qlora-finetune`` on what users give by mistake: one line, status 2, nothing written and nothing lost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.releases import since

from .test_finetune import invoke, losses

SHORT = ("--max-steps", "1", "--batch-size", "2", "--max-length", "48")


@pytest.fixture(scope="session")
def dense_model(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("llama")


def refused(*arguments: Any) -> str:
    """The one line of an error, without the program's name."""
    status, out, err = invoke(*arguments)
    assert status == 2, err
    assert out == ""
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("qlora-finetune: error: ")
    return last.removeprefix("qlora-finetune: error: ")


def row(**values: Any) -> str:
    return json.dumps(values) + "\n"


CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "answer"}]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--learning-rate", "1e39"), "learning_rate=1e+39; it must be below 2147483648"),
        (("--learning-rate", "100", "--lora-plus", "1e5"), "a rate of 1e+07; it must be at most 1000000"),
        (("--neftune", "1e300"), "neftune=1e+300; it must be below 2147483648"),
        (("--weight-decay", "nan"), "weight_decay=nan; it must be at least 0"),
        (("--batch-size", str(10**30)), "batch_size=1000000000000000000000000000000; it must be below"),
        (("--max-steps", str(10**30)), "it must be below 2147483648"),
        (("--memory-limit", "1e308"), "memory_limit=1e+308; it must be below 2147483648"),
        (("--memory-limit", "1e-300"), "0.00 MiB are there"),
        (("--scheduler", "polynomial", "--learning-rate", "1e-8"), "it must be above 1e-07, where that ends"),
        (("--sample", "\udc80 x"), "sample: character 0 is half of a surrogate pair"),
        (("--cuda-graphs", "on", "--device", "cpu"), "CUDA graphs need a CUDA GPU; allowed here: auto, off"),
        (("--validation", "a\0b.txt"), "--validation 'a\\x00b.txt': no file can have that name"),
        (
            ("--resume", "--overwrite"),
            "--resume goes on with a run, --overwrite begins anew: give one of them",
        ),
    ],
)
def test_options_beyond_what_can_be(
    options: tuple[str, ...], message: str, quantised: Path, rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "adapter"
    assert message in refused(quantised, "--data", rows, "--output", output, *options)
    assert list(tmp_path.iterdir()) == []


def _fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.mkdir(), "is a folder; give a file of rows"),
        (_fifo, "is no ordinary file, and rows are read more than once"),
        (lambda p: p.symlink_to(p.parent / "gone.jsonl"), "gone.jsonl, which "),
        (lambda p: p.symlink_to("/dev/null"), "is no ordinary file"),
        (lambda p: p.write_bytes(b"\xff\xfe{\0"), "can't decode byte 0xff"),
        (lambda p: p.write_text(row(text="a b c d")[:-2] + ', "text": "other"}'), "'text' appears twice"),
        (lambda p: p.write_text(json.dumps([{"text": "a b"}])), "expected an object, got list"),
        (lambda p: p.write_text("[" * 100_000), "is not JSON: maximum recursion depth"),
        (lambda p: p.write_text(row(prompt=[{"role": "user"}], completion="x")), "'prompt' is list"),
        (lambda p: p.write_text(row(prompt="word " * 99, completion="x")), "--max-length is too low"),
    ],
)
def test_data_that_cannot_be_read(
    make: Callable[[Path], None], message: str, quantised: Path, tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    make(data)
    assert message in refused(quantised, "--data", data, "--output", tmp_path / "adapter", *SHORT)
    assert list(tmp_path.iterdir()) == [data]


def test_what_is_cut_or_passed_over_is_told(quantised: Path, tmp_path: Path) -> None:
    data, other = tmp_path / "rows.jsonl", tmp_path / "other.jsonl"
    data.write_text(row(text="word " * 200) + row(text="some words") + "\n")
    other.write_text(row(text="other words") + "{\n")
    options = ("--validation", other, "--skip-bad-rows", *SHORT)
    status, _, err = invoke(quantised, "--data", data, "--output", tmp_path / "adapter", *options)
    assert status == 0, err
    assert f"note: {data}: 1 of 2 rows are longer than 48 tokens, cut there" in err
    assert f"note: {other}: 1 bad rows passed over, the first on line 2: is not JSON" in err


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "Expected an expression"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_chat_template_that_refuses(template: str, why: str, quantised: Path, tmp_path: Path) -> None:
    model, data = tmp_path / "model", tmp_path / "rows.jsonl"
    shutil.copytree(quantised, model)
    (model / "chat_template.jinja").write_text(template)
    data.write_text(row(**CHAT))
    found = refused(model, "--data", data, "--output", tmp_path / "adapter", *SHORT)
    assert f"line 1: the chat template refuses these messages: {why}" in found
    assert not (tmp_path / "adapter").exists()


def test_no_file_of_the_users_is_removed(
    quantised: Path, dense_model: Path, rows: Path, tmp_path: Path
) -> None:
    """``checkpoints`` and ``base`` are common names, and --output may be a folder with work in it."""
    for name, model in (("checkpoints", quantised), ("base", dense_model)):
        work = tmp_path / name
        (work / name).mkdir(parents=True)
        (work / name / "thesis.txt").write_text("years of work")
        for more in ((), ("--overwrite",)):
            message = refused(model, "--data", rows, "--output", work, *SHORT, *more)
            assert "give another" in message
            assert (work / name / "thesis.txt").read_text() == "years of work"
            assert [path.name for path in work.iterdir()] == [name]


def test_what_an_outcome_left_is_replaced(quantised: Path, rows: Path, tmp_path: Path) -> None:
    """A file where a run puts its adapter together, and a folder of a run that was cut off there."""
    for name, make in (("file", Path.touch), ("folder", Path.mkdir)):
        output = tmp_path / name
        output.mkdir()
        make(output / ".adapter.unfinished")
        assert invoke(quantised, "--data", rows, "--output", output, *SHORT)[0] == 0
        assert not (output / ".adapter.unfinished").exists()
        assert (output / "adapter_model.safetensors").is_file()


def test_beginning_anew_removes_the_runs_own_files_alone(quantised: Path, rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    run = (quantised, "--data", rows, "--output", output, "--batch-size", "2", "--max-length", "48")
    assert invoke(*run, "--max-steps", 2, "--save-every", 1)[0] == 0
    (output / "checkpoints" / "notes.txt").write_text("mine")
    (output / "checkpoints" / "checkpoint-best").mkdir()
    assert invoke(*run, "--max-steps", 3, "--overwrite")[0] == 0
    left = {path.name for path in (output / "checkpoints").iterdir()}
    assert left == {"checkpoint-3", "checkpoint-best", "notes.txt", "settings.json"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.write_text("a file"), "is not a folder; one is needed there"),
        (lambda p: p.symlink_to(p.parent / "gone"), "is a link to nothing"),
        (lambda p: (p.mkdir(), (p / "checkpoints").write_text("")), "checkpoints is not a folder"),
        (lambda p: None, "File name too long"),
    ],
)
def test_an_output_that_cannot_be(
    make: Callable[[Path], Any], message: str, quantised: Path, rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / ("n" * 300 if "too long" in message else "adapter")
    make(output)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert message in refused(quantised, "--data", rows, "--output", output, *SHORT)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_the_adapters_folder_is_no_output(quantised: Path, rows: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(quantised, model)
    before = {path.name: path.read_bytes() for path in (model / "loftq_init").iterdir()}
    options = ("--output", model / "loftq_init", "--overwrite", *SHORT)
    assert "is the adapter's own folder" in refused(model, "--data", rows, *options)
    assert {path.name: path.read_bytes() for path in (model / "loftq_init").iterdir()} == before


def test_a_resumed_run_has_the_same_base_and_adapter(
    quantised: Path, dense_model: Path, rows: Path, tmp_path: Path
) -> None:
    from .command import invoke as loftq_init

    other, output = tmp_path / "other", tmp_path / "adapter"
    assert loftq_init(dense_model, other, "--bits", 3, "--rank", 4, "--quiet").code == 0
    run = ("--data", rows, "--output", output, *SHORT)
    assert invoke(quantised, *run)[0] == 0
    before = losses(output)
    assert "--resume: base was '" in refused(other, *run, "--resume")
    assert "adapter's lora_dropout was 0.0, is 0.5" in refused(
        quantised, *run, "--resume", "--dropout", "0.5"
    )
    assert "is not there: that run's MODEL was another one" in refused(dense_model, *run, "--resume")
    assert not (output / "base").exists()
    moved = tmp_path / "moved"
    shutil.copytree(quantised, moved)
    assert invoke(moved, *run, "--resume")[0] == 0
    assert losses(output) == before


def _config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def _tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})

    return spoil


def _first(tensors: dict[str, torch.Tensor]) -> str:
    return min(tensors)


def _none_of_the_last_layer(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".layers.1." in name]:
        del tensors[name]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "holds a list, not a JSON object"),
        (_config(r=0), "r has the value 0; a rank is at least 1"),
        (_config(r=8), "has rank 4, adapter_config.json says 8"),
        (_config(lora_alpha=None), "lora_alpha has the value None, not a number"),
        (_config(lora_alpha=0), "lora_alpha is 0; such factors have no effect, and learn nothing"),
        (_config(lora_dropout=1), "lora_dropout is 1, not a number in [0, 1)"),
        (_config(peft_type="IA3"), "peft_type is 'IA3'"),
        (_config(target_modules=["nosuch"]), "does not fit this model: Target modules {'nosuch'}"),
        (_config(target_modules=["q_proj"]), "have no place in this model"),
        (_tensors(_none_of_the_last_layer), "Found missing adapter keys"),
        (_tensors(lambda t: t.update({_first(t): torch.zeros(4, 5)})), "size mismatch for"),
        (_tensors(lambda t: t[_first(t)].fill_(torch.nan)), "the adapter holds values that are no numbers"),
    ],
)
def test_an_adapter_that_does_not_fit(
    spoil: Callable[[Path], None], message: str, quantised: Path, rows: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "start"
    shutil.copytree(quantised / "loftq_init", adapter)
    spoil(adapter)
    options = ("--adapter", adapter, "--output", tmp_path / "out", *SHORT)
    assert message in refused(quantised, "--data", rows, *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--alpha", "nan"), "alpha nan; it must be a positive number below 2**53"),
        (("--alpha", "1e300"), "alpha 1e+300; it must be a positive number below 2**53"),
        (("--rank", "0"), "rank 0; a rank is an integer of at least 1"),
        (("--target-modules", "("), "'(' is not a regular expression"),
        (("--target-modules", "nosuch"), "Target modules {'nosuch'} not found"),
    ],
)
def test_a_new_adapter_that_cannot_be(
    options: tuple[str, ...], message: str, quantised: Path, dense_model: Path, rows: Path, tmp_path: Path
) -> None:
    """On a dense model, and on a quantised one without an adapter."""
    bare = tmp_path / "bare"
    shutil.copytree(quantised, bare, ignore=shutil.ignore_patterns("loftq_init"))
    for model in (bare, dense_model):
        output = tmp_path / "out"
        assert message in refused(model, "--data", rows, "--output", output, *SHORT, *options)
        assert not output.exists()


def _without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()


def _model_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def _nan_norm(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(torch.nan)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("which", "spoil", "message"),
    [
        ("dense_model", _without_tokenizer, "has no tokenizer to read texts with"),
        pytest.param(
            "quantised",
            _model_config(max_position_embeddings=None),
            "'max_position_embeddings' expected int",
            marks=since("5.4", "takes what config.json says of it, and trains", "transformers"),
        ),
        ("quantised", _model_config(quantization_config=None), "does not hold what its config.json says"),
        ("quantised", _model_config(quantization_config=[]), "is quantised with '[]'"),
        (
            "quantised",
            _nan_norm,
            "nothing was trained before it, so the base holds values that are no numbers",
        ),
    ],
)
def test_a_base_that_cannot_be_trained(
    which: str,
    spoil: Callable[[Path], None],
    message: str,
    rows: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    model = tmp_path / "model"
    shutil.copytree(request.getfixturevalue(which), model)
    spoil(model)
    output = tmp_path / "out"
    assert message in refused(model, "--data", rows, "--output", output, *SHORT)
    assert not (output / "base").exists()
    assert not (output / "adapter_config.json").exists()


def test_a_kill_while_beginning_anew_leaves_a_run(
    quantised: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is taken of an old checkpoint without its mark, and the folder is still known for a run's."""
    output = tmp_path / "adapter"
    run = (quantised, "--data", rows, "--output", output, "--batch-size", "2", "--max-length", "48")
    assert invoke(*run, "--max-steps", 2, "--save-every", 1)[0] == 0
    whole = losses(output)

    def stopped(path: Path) -> None:
        (path / "adapter_model.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("qlora_engine.training.output.shutil.rmtree", stopped)
        assert invoke(*run, "--max-steps", 2, "--save-every", 1, "--overwrite")[0] == 130
    left = {path.name for path in (output / "checkpoints").iterdir()}
    assert left == {"checkpoint-1", "checkpoint-2", "settings.json"}
    assert invoke(*run, "--max-steps", 2, "--save-every", 1, "--overwrite")[0] == 0
    assert losses(output) == whole
