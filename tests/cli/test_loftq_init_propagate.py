"""``loftq-init --propagate``: what is written, resumed and refused."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_engine import LoftQConfig, LoraConfig, PeftModel, get_peft_model, report
from qlora_engine.loading import from_pretrained

from .command import files, invoke
from .test_loftq_init_resume import in_child

IDS = torch.arange(3, 99).reshape(2, 48)


def adapted(out: Path) -> Any:
    return PeftModel.from_pretrained(from_pretrained(out, dtype=torch.float32), out / "loftq_init").eval()


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS)[0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", ("--bits", 2)),
        ("llama", ("--bits", 4, "--double-quant")),
        ("gpt2", ("--bits", 2)),
        ("gpt2", ("--bits", 4, "--save-format", "dense")),
        ("bert", ("--bits", 2)),
        ("qwen3_moe", ("--bits", 2, "--max-shard-size", "40KB")),
    ],
    ids=str,
)
def test_what_is_written_is_what_was_said(
    name: str,
    options: tuple[Any, ...],
    tmp_path: Path,
    texts: Path,
    make_checkpoint: Any,
) -> None:
    model = make_checkpoint(name, dtype=torch.float32)
    if name == "bert":
        options = (*options[:2], "--target-modules", r"word_embeddings|.*\.(query|value|dense)")
    given = (*options, "--rank", 4, "--window", 64, "--calibration", texts, "--method", "qera")
    one, other = tmp_path / "one", tmp_path / "other"
    done = invoke(model, one, *given, "--propagate", "--verify", "--json")
    assert done.code == 0, done.err
    events = [json.loads(line) for line in done.out.splitlines()]
    layers = [event for event in events if event["event"] == "layer"]
    assert events[-1]["event"] == "verified"  # weight errors are the original's, and true
    found = report.RunReport.read(one)
    assert sorted(layer["name"] for layer in layers) == sorted(layer.name for layer in found.layers)
    assert not any(layer["kept"] for layer in layers)
    (about,) = [note for note in found.notes if note.startswith("calibrated on")]
    assert "behind the quantised blocks" in about
    assert not list(tmp_path.glob(".o*"))  # neither workspace nor calibration is left
    assert invoke(model, other, *given).code == 0
    plain = {layer.name: layer for layer in report.RunReport.read(other).layers}
    changed = 0
    for layer in found.layers:
        before = plain[layer.name]
        assert layer.weight_norm == pytest.approx(before.weight_norm, rel=1e-5)
        assert layer.error_plain == pytest.approx(before.error_plain, rel=1e-4)
        if ".0." in layer.name:  # nothing is quantised before the first block
            assert layer.error == pytest.approx(before.error, rel=1e-3)
        changed += layer.error != pytest.approx(before.error, rel=1e-3)
    assert changed
    assert torch.isfinite(output(adapted(one))).all()


def test_the_same_model_as_in_python(
    tmp_path: Path, texts: Path, make_checkpoint: Any, make_tokenizer: Any
) -> None:
    """``LoftQConfig(propagate=True)``, which solves every layer twice, is the reference."""
    from transformers import AutoModelForCausalLM

    model = make_checkpoint("llama", dtype=torch.float32)
    given = ("--bits", 3, "--rank", 4, "--calibration", texts, "--window", 64, "--method", "qera")
    for name, more in (("plain", ()), ("behind", ("--propagate",))):
        assert invoke(model, tmp_path / name, *given, *more).code == 0
    settings = LoftQConfig(
        loftq_bits=3, calibration=str(texts), tokenizer=make_tokenizer(), window=64, method="qera"
    )
    settings.propagate = True
    config = LoraConfig(
        r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights="loftq", loftq_config=settings
    )
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    want = output(base)
    reference = output(get_peft_model(base, config).eval())
    plain, behind = (output(adapted(tmp_path / name)) for name in ("plain", "behind"))
    # a code on the edge between two may fall to either side; the rest is the same arithmetic
    apart = (behind - reference).norm() / (reference - want).norm()
    assert apart < 0.05
    assert (plain - reference).norm() / (reference - want).norm() > 5 * apart


def run_in_child(kill_at: int, *arguments: Any) -> int:
    return in_child(kill_at, lambda: invoke(*arguments).code)


def test_killed_and_resumed_gives_the_same_bytes(tmp_path: Path, texts: Path, make_checkpoint: Any) -> None:
    model = make_checkpoint("llama", dtype=torch.float32)
    given = ("--bits", 3, "--rank", 4, "--window", 64, "--calibration", texts, "--method", "qera")
    given = (*given, "--propagate", "--max-shard-size", "40KB", "--calibration-windows", 24)
    (tmp_path / "whole").mkdir()
    assert run_in_child(-1, model, tmp_path / "whole" / "out", *given) == 0
    wanted = files(tmp_path / "whole" / "out")
    kept = []
    for kill_at in (5, 30, 55, 80, 90):  # among the layers, between them and the files, among the files
        out = tmp_path / str(kill_at) / "out"
        out.parent.mkdir()
        assert run_in_child(kill_at, model, out, *given) == -signal.SIGKILL
        kept.append(len(list(out.parent.glob(".out.unfinished/pieces/*.done"))))
        assert run_in_child(-1, model, out, *given, "--resume") == 0
        ours = {name: data for name, data in files(out).items() if name != "loftq_init/adapter_config.json"}
        assert ours == {name: data for name, data in wanted.items() if name in ours}
        assert len(ours) == len(wanted) - 1  # the config names its folder
        (about,) = [n for n in report.RunReport.read(out).notes if n.startswith("calibrated on")]
        assert "behind the quantised blocks" in about
    assert kept[0] < kept[1] < 14
    assert kept[-1] == 14


def test_widths_under_a_budget(tmp_path: Path, texts: Path, make_checkpoint: Any) -> None:
    model = make_checkpoint("llama", dtype=torch.float32)
    given = ("--budget", 3.3, "--rank", 4, "--window", 64, "--calibration", texts, "--method", "qera")
    done = invoke(model, tmp_path / "out", *given, "--propagate", "--verify")
    assert done.code == 0, done.err
    found = report.RunReport.read(tmp_path / "out")
    assert len({layer.format for layer in found.layers}) > 1
    assert any("behind the quantised blocks" in note for note in found.notes)
    assert not list(tmp_path.glob(".out*"))


def test_wide_layers_keep_their_own_weight(
    tmp_path: Path,
    texts: Path,
    make_checkpoint: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qlora_engine import calibrated_run

    monkeypatch.setattr(calibrated_run, "widest_full_moment", lambda memory: 80)
    model = make_checkpoint("llama", dtype=torch.float32)
    given = ("--bits", 3, "--rank", 4, "--window", 64, "--calibration", texts, "--method", "qera")
    done = invoke(model, tmp_path / "out", *given, "--propagate", "--verify")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--propagate",), "it needs --calibration TEXTS"),
        (("--propagate", "--load-calibration", "x"), "has no use for --load-calibration"),
        (
            ("--propagate", "--calibration", "TEXTS", "--save-calibration", "x"),
            "has no use for --load-calibration and --save-calibration",
        ),
        (
            ("--propagate", "--calibration", "TEXTS", "--method", "loftq"),
            "loftq makes no use of what the texts bring",
        ),
        (("--propagate", "--calibration", "nowhere.txt"), "no such file or folder: nowhere.txt"),
        (("--propagate", "--calibration", "TEXTS", "--window", "1"), "at least 2 tokens"),
    ],
)
def test_what_is_refused(
    options: tuple[str, ...],
    message: str,
    tmp_path: Path,
    texts: Path,
    make_checkpoint: Any,
) -> None:
    model = make_checkpoint("llama", dtype=torch.float32)
    given = [str(texts) if option == "TEXTS" else option for option in options]
    assert message in invoke(model, tmp_path / "out", "--rank", 4, *given).error()
    assert not list(tmp_path.iterdir())


def test_an_encoder_decoder_is_refused(tmp_path: Path, texts: Path, make_checkpoint: Any) -> None:
    model = make_checkpoint("t5", dtype=torch.float32)
    done = invoke(model, tmp_path / "out", "--rank", 4, "--propagate", "--calibration", texts, "--window", 64)
    assert "--propagate: cannot run this model block by block" in done.error()
    assert not list(tmp_path.iterdir())


def test_several_processes_are_refused(
    tmp_path: Path,
    texts: Path,
    make_checkpoint: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qlora_engine import distributed
    from qlora_engine.cli import common

    model = make_checkpoint("llama", dtype=torch.float32)
    two = distributed.World(0, 2)
    monkeypatch.setattr(distributed, "world", lambda: two)
    monkeypatch.setattr(distributed, "join", lambda kind: two)
    monkeypatch.setattr(common, "say_once", lambda say: say())
    done = invoke(model, tmp_path / "out", "--rank", 4, "--propagate", "--calibration", texts)
    assert "start it without torchrun" in done.error()
