"""Grouping, labels and reasons; error_report on models in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_engine import LoftQConfig, LoraConfig, get_peft_model
from qlora_engine.compare import _labels, error_report, groups, kind_of, read_runs, why
from qlora_engine.errors import InputError
from qlora_engine.report import LayerReport


def layer(name: str, **changed: Any) -> LayerReport:
    values = {"kind": "linear", "shape": (64, 64), "format": "nf4", "block_size": 64, "double_quant": False}
    values |= {"rank": 8, "scaling": 1.0, "bits_per_weight": 4.5, "weight_norm": 1.0}
    values |= {"error_plain": 0.09, "error": 0.07}
    return LayerReport(name=name, **{**values, **changed})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.mlp.up_proj", "mlp.up_proj"),
        ("transformer.h.11.attn.c_attn", "attn.c_attn"),
        ("model.layers.0.mlp.experts.5.w1", "mlp.experts.5.w1"),
        ("lm_head", "lm_head"),
        ("pooler.dense", "pooler.dense"),
        ("classifier.0", "classifier.0"),
    ],
)
def test_kind_of(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_groups_take_geometric_means_and_weighted_bits() -> None:
    big = layer("m.0.up", error=0.04, shape=(96, 64), bits_per_weight=4.5)
    small = layer("m.1.up", error=0.09, shape=(32, 64), bits_per_weight=2.5)
    (group,) = groups([big, small])
    assert (group.kind, group.layers, group.weights) == ("up", 2, 8192)
    assert group.error == pytest.approx(0.06)
    assert group.bits_per_weight == pytest.approx(4.0)
    assert group.output_error is None


def test_labels_are_short_and_different(tmp_path: Path) -> None:
    assert _labels([tmp_path / "a" / "out", tmp_path / "b" / "out"]) == ["a/out", "b/out"]
    assert _labels([tmp_path / "x", tmp_path / "y" / "report.json"]) == ["x", "y"]
    assert _labels([tmp_path / "x", tmp_path / "x"]) == ["x", "x (2)"]


def test_why_names_what_differs() -> None:
    usual = [layer(f"m.{i}.q") for i in range(5)]
    narrow = layer("m.5.q", format="nf2", bits_per_weight=2.5, error_plain=0.5, error=0.4)
    heavy = layer("m.6.q", error_plain=0.12, error=0.0933)
    weak = layer("m.7.q", error=0.085, note="kept dense")
    layers = [*usual, narrow, heavy, weak]
    assert why(usual[0], layers) == "near the median in every respect"
    assert "2.50 bits where the median is 4.50" in why(narrow, layers)
    assert "plain error 33 % above the median of nf4" in why(heavy, layers)
    assert "takes 6 % off where the median is 22 %: rank 8 is 12.5 % of 64; kept dense" in why(weak, layers)
    assert "it has no adapter" in why(layer("m.8.q", rank=0, error=0.09), layers)


def test_error_report_of_a_model_in_memory(make_model: Callable[..., Any]) -> None:
    config = LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=4)
    )
    model = get_peft_model(make_model("llama"), config)
    table = error_report(model)
    assert len(table) == 14
    assert all(0 < row.error < row.error_plain < 0.2 for row in table)
    assert {row.shape for row in table} == {(64, 64), (32, 64), (96, 64), (64, 96)}
    json.dumps(table.to_json(), allow_nan=False)
    assert "q_proj" in str(table)
    assert f"{table[0].error:.4f}" in str(table)


def test_error_report_refuses_what_has_no_errors(make_model: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no layer that was initialised from its weight"):
        error_report(make_model("llama"))
    with pytest.raises(InputError, match=r"no such folder"):
        error_report(tmp_path / "none")
    with pytest.raises(InputError, match="neither a model"):
        error_report([1, 2])


def test_a_folder_without_a_report_is_named(tmp_path: Path) -> None:
    (tmp_path / "plain" / "inner").mkdir(parents=True)
    with pytest.raises(InputError, match=r"plain/inner has no report\.json"):
        read_runs([tmp_path / "plain" / "inner"])
