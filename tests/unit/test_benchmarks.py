"""The benchmarks' own parts: a wrong harness would make every number wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import activations, common, curve, error_report, real_models, results, short_finetune
from qlora_engine import inits
from quant import QuantSpec


def test_time_each_interleaves_and_orders_percentiles() -> None:
    order: list[str] = []
    calls = {
        "short": lambda: order.append("short"),
        "long": lambda: (order.append("long"), time.sleep(0.004)),
    }
    timings = common.time_each(calls, warmup=1, repeats=4)
    assert order == ["short", "long"] * 5
    assert timings["long"].runs == 4
    assert timings["long"].p80 >= timings["long"].median >= timings["long"].p20 >= 0.004
    assert timings["short"].median < timings["long"].median


def test_experts_are_measured_in_every_way(tmp_path: Path) -> None:
    from benchmarks import experts

    if not hasattr(torch, "_grouped_mm"):
        pytest.skip(f"torch {torch.__version__} has no grouped products")
    path = tmp_path / "experts.json"
    given = ["--sizes", "tiny", "--device", "cpu", "--tokens", "3", "--repeats", "1", "--json", str(path)]
    assert experts.main(given) == 0
    rows = {row["experts"]: row for row in json.loads(path.read_text())["rows"]}
    quantised = ["nf4", "nf4, LoRA 16", "nf4, grouped_mm", "nf4, LoRA 16, grouped_mm"]
    assert list(rows) == ["dense, grouped_mm", "dense, eager", *quantised]
    assert rows["nf4"]["held MB"] == pytest.approx(rows["dense, eager"]["held MB"] * 4.5 / 32)
    assert all(row["ms"] > 0 for row in rows.values())


def test_table_leaves_missing_cells_empty() -> None:
    rows = [{"name": "a", "error": 0.123456}, {"name": "bcd", "seconds": 2}]
    assert common.table(rows).splitlines() == [
        "| name | error  | seconds |",
        "| ---- | ------ | ------- |",
        "| a    | 0.1235 |         |",
        "| bcd  |        | 2       |",
    ]


def test_save_records_what_it_ran_on(tmp_path: Path) -> None:
    command = [
        str(tmp_path / "benchmarks" / "x.py"),
        "--json",
        "here.json",
        "--text",
        str(tmp_path / "a b.txt"),
    ]
    common.save(tmp_path / "deep" / "rows.json", command=command, rows=[{"a": 1}])
    saved = json.loads((tmp_path / "deep" / "rows.json").read_text())
    assert saved["rows"] == [{"a": 1}]
    assert saved["command"] == "python -m benchmarks.x --text 'a b.txt'"
    assert saved["environment"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["rows.json"]


@pytest.mark.parametrize("command", [["benchmarks.x", "-n"], ["python", "-m", "benchmarks.x", "-n"]])
def test_save_writes_a_command_to_repeat(tmp_path: Path, command: list[str]) -> None:
    common.save(tmp_path / "rows.json", command=command, rows=[])
    assert json.loads((tmp_path / "rows.json").read_text())["command"] == "python -m benchmarks.x -n"


def test_results_page_is_up_to_date() -> None:
    """RESULTS.md is made from the stored measurements: `python -m benchmarks.results` writes it."""
    assert results.PAGE.read_text() == results.render()
    assert results.STORED.is_dir()


def test_windows_splits_do_not_overlap(make_tokenizer: Callable[[], Any]) -> None:
    tokenizer = make_tokenizer()
    text = "".join(chr(97 + i % 26) for i in range(4000)) + "!" * 4000
    seen = real_models.windows(text, tokenizer, count=3, length=16, part=0, parts=2)
    unseen = real_models.windows(text, tokenizer, count=3, length=16, part=1, parts=2)
    assert seen.shape == unseen.shape == (3, 16)
    assert "!" not in tokenizer.decode(seen.flatten())
    assert set(tokenizer.decode(unseen.flatten())) == {"!"}
    with pytest.raises(ValueError, match="fewer than one window of 64"):
        real_models.windows("short", tokenizer, count=1, length=64)


def test_perplexity_is_the_models_own_loss(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    tokens = torch.randint(3, 384, (3, 700))  # two windows a batch, then one
    with torch.no_grad():
        expected = model(input_ids=tokens, labels=tokens).loss.exp().item()
    assert activations.perplexity(model, tokens) == pytest.approx(expected, rel=1e-5)


def test_input_moments_match_a_direct_computation(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    tokens = torch.randint(3, 384, (40, 60))
    names = list(activations.linears(model))
    assert "lm_head" not in names
    assert len(names) == 14
    moments = activations.input_moments(model, tokens, names)
    with torch.no_grad():
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(tokens)).reshape(-1, 64)
    for projection in ("q_proj", "k_proj", "v_proj"):
        H = moments[f"model.layers.0.self_attn.{projection}"]
        torch.testing.assert_close(H, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    assert moments["model.layers.1.mlp.down_proj"].shape == (96, 96)


@pytest.mark.parametrize("iters", [1, 3])
def test_peft_peer_finds_what_ours_finds(iters: int) -> None:
    """At scaling 1 the two algorithms are one: PEFT's exact SVD, ours within its contract of 1.001."""
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    from benchmarks.peers import peft_loftq

    weight = torch.randn(96, 128)
    base, A, B = peft_loftq(weight, 8, iters)
    theirs = float((weight - base - B @ A).norm() / weight.norm())
    ours = inits.initialise(weight, method="loftq", spec=QuantSpec("nf4"), rank=8, iters=iters)
    assert ours.error <= 1.001 * theirs
    if iters == 1:
        assert ours.error == pytest.approx(theirs, rel=1e-3)


def test_short_finetune_trains_the_factors_and_restores_the_model(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    tokens = torch.randint(3, 384, (6, 32))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {name: module.weight.detach() for name, module in activations.linears(model).items()}
    arguments = {"steps": 12, "batch": 2, "rate": 5e-3}
    found = {}
    for method, iters in (("qlora", 1), ("loftq", 5)):
        candidate = error_report.Candidate(method, QuantSpec("nf2"), 8, iters)
        starts = {name: candidate.start(weight, None) for name, weight in weights.items()}
        found[method] = short_finetune.finetune(model, starts, tokens, tokens, **arguments)
    for untrained, trained in found.values():
        assert trained < untrained  # on the very rows it is trained on
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    plain = error_report.Candidate("plain", QuantSpec("nf2"))
    for name, weight in weights.items():
        model.get_submodule(name).weight.data = plain.solve(weight, None)
    # QLoRA's start is plain quantisation until it is trained
    assert found["qlora"][0] == pytest.approx(activations.perplexity(model, tokens), rel=1e-5)


def test_finetune_suite_puts_the_peers_in(make_model: Callable[..., Any]) -> None:
    rows = [
        (candidate.method, candidate.iters)
        for candidate in error_report.candidates("finetune", ["nf4"], block_size=64, peft=True)
        if candidate.method != "plain"
    ]
    assert rows[0] == ("qlora", 0)
    assert {("peft", 1), ("peft", 5), ("loftq", 5), ("recipe", 1)} <= set(rows)


def test_our_curve_is_pefts(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    path = tmp_path / "curve.json"
    arguments = [
        "--tiny",
        "--steps",
        "4",
        "--rank",
        "4",
        "--max-length",
        "64",
        "--learning-rate",
        "0.02",
        "--json",
    ]
    assert curve.main([*arguments, str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["ours"] < rows[0]["ours"] - 0.1
    assert (
        max(row["apart"] for row in rows) < 5e-3
    )  # the tiny checkpoint is in float16, in which both compute
