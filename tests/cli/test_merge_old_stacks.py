"""Stacked experts in adapters of PEFT before 0.20: read where the factors lie as now, else refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import qlora_engine as qe
from qlora_engine.errors import InputError
from tests.cli.test_merge import done, error, invoke, spoil_config
from tests.parity.releases import older_than

IDS = torch.arange(1, 25).reshape(2, 12)
REFUSED = "orders the factors of stacked experts otherwise"
OPTIONS = {"r": 4, "target_parameters": ["down_proj"], "target_modules": ["q_proj"]}


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def is_read(base: Path, adapter: Path, output: Path, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits(qe.PeftModel.from_pretrained(load(base), adapter)), expected)
    done(invoke(base, adapter, output))
    torch.testing.assert_close(logits(load(output)), expected, rtol=1e-4, atol=1e-5)


def is_refused(base: Path, adapter: Path, output: Path) -> None:
    with pytest.raises(InputError, match=REFUSED):
        qe.PeftModel.from_pretrained(load(base), adapter)
    other = qe.get_peft_model(load(base), qe.LoraConfig(**OPTIONS))
    before = logits(other)
    for name in ("more", "default"):
        with pytest.raises(InputError, match=REFUSED):
            qe.hotswap_adapter(other, adapter, name) if name == "default" else other.load_adapter(
                adapter, name
            )
    assert set(other.peft_config) == {"default"}
    assert torch.equal(logits(other), before)
    assert REFUSED in error(invoke(base, adapter, output))
    assert not output.exists()


@pytest.mark.parametrize(
    ("name", "release", "read"),
    [
        ("mixtral", "0.17.1", False),
        ("mixtral", "0.18.0", False),
        ("mixtral", "0.19.1", False),
        ("mixtral", "0.20.0", True),
        ("mixtral", "0.20.1.dev0", True),
        ("gpt_oss", "0.18.1", True),  # (in, out), which 0.19 alone has otherwise
        ("gpt_oss", "0.19.0", False),
        ("gpt_oss", "0.21.2", True),
    ],
)
def test_by_the_release_that_wrote_it(
    name: str, release: str, read: bool, mixture: Callable[[str], Path], tmp_path: Path
) -> None:
    base = mixture(name)
    model = qe.get_peft_model(load(base), qe.LoraConfig(init_lora_weights=False, **OPTIONS))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    spoil_config(tmp_path / "adapter", peft_version=release)
    if read:
        is_read(base, tmp_path / "adapter", tmp_path / "out", expected)
    else:
        is_refused(base, tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_what_the_installed_peft_writes(name: str, mixture: Callable[[str], Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = mixture(name)
    model = peft.get_peft_model(load(base), peft.LoraConfig(init_lora_weights=False, **OPTIONS))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    if older_than("0.20") and (name == "mixtral" or not older_than("0.19")):
        is_refused(base, tmp_path / "adapter", tmp_path / "out")
    else:
        is_read(base, tmp_path / "adapter", tmp_path / "out", expected)
