"""Options are checked once, and say what is allowed."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from qlora_engine.errors import InputError
from qlora_engine.options import InitOptions, init_methods, parse_width
from quant import QuantSpec, formats


def test_defaults_are_the_papers() -> None:
    options = InitOptions()
    assert (options.method, options.format, options.block_size, options.rank) == ("loftq", "nf4", 64, 16)
    assert options.lora_alpha == 16
    assert options.spec_for("") == QuantSpec()
    assert json.loads(json.dumps(options.to_dict())) == options.to_dict()
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.rank = 3  # type: ignore[misc]


def test_init_methods_quantise_without_calibration() -> None:
    assert {"loftq", "qpissa", "qlora"} <= set(init_methods())
    assert not {"default", "gaussian", "pissa", "eva"} & set(init_methods())


@pytest.mark.parametrize("name", formats.names())
def test_every_format_is_allowed(name: str) -> None:
    assert InitOptions(format=name).spec_for("x").format == name
    assert parse_width(f"{name}/128") == (name, 128, None)
    assert parse_width(f"{name}/128/double") == (name, 128, True)


@pytest.mark.parametrize(
    ("text", "width"),
    [
        (4, ("nf4", None, None)),
        ("3", ("nf3", None, None)),
        ("2/32", ("nf2", 32, None)),
        ("8", ("int8", None, None)),
        ("nf3/64/double", ("nf3", 64, True)),
        ("4//plain", ("nf4", None, False)),
    ],
)
def test_parse_width(text: str | int, width: tuple[str, int | None, bool | None]) -> None:
    assert parse_width(text) == width


def test_spec_for_a_pattern() -> None:
    options = InitOptions(bits_pattern={"q": "8", "k": "nf3/32"}, double_quant=True)
    assert options.spec_for("q") == QuantSpec("int8", 64, True)
    assert options.spec_for("k") == QuantSpec("nf3", 32, True)
    assert options.spec_for("anything") == QuantSpec("nf4", 64, True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "gaussian"}, "method 'gaussian'; allowed: "),
        ({"method": "nope"}, "method 'nope'"),
        ({"format": "nf44"}, "did you mean 'nf4'"),
        ({"rank": 0}, "an integer of at least 1"),
        ({"rank": True}, "an integer of at least 1"),
        ({"rank": 2.0}, "an integer of at least 1"),
        ({"rank_pattern": {"a": "3"}}, "rank-pattern a='3'"),
        ({"alpha": 0}, "must be a positive number"),
        ({"alpha": float("inf")}, "must be a positive number"),
        ({"alpha_pattern": {"a": -1}}, "alpha-pattern a=-1"),
        ({"iters": 0}, "iters 0"),
        ({"max_shard_size": "x"}, "is not a size"),
        ({"max_shard_size": 0}, "is not a size"),
        ({"block_size": 8}, "block_size 8"),
        ({"bits_pattern": {"a": "nf4/8"}}, "block_size 8"),
        ({"bits_pattern": {"(": "4"}}, "is not a regular expression"),
        ({"rank_pattern": {"*": 4}}, "is not a regular expression"),
        ({"target_modules": "[a"}, "is not a regular expression"),
        ({"dtype": "float64"}, "allowed: auto, float16, bfloat16, float32"),
        ({"adapter_dtype": "auto"}, "allowed: float16, bfloat16, float32"),
        ({"scales": "max"}, "allowed: absmax, mse, signed-mse"),
        ({"save_format": "gguf"}, "allowed: auto, bnb, native, dense"),
    ],
)
def test_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        InitOptions(**values)
    assert message in str(caught.value)


@pytest.mark.parametrize(("alpha", "rank", "wanted"), [(None, 8, 8), (32.0, 8, 32), (1.5, 8, 1.5)])
def test_lora_alpha(alpha: float | None, rank: int, wanted: float) -> None:
    found = InitOptions(alpha=alpha, rank=rank).lora_alpha
    assert found == wanted
    assert isinstance(found, int) == float(wanted).is_integer()
