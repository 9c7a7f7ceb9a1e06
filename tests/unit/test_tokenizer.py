"""A model's tokenizer, and that the empty ones which transformers makes without files are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_engine.errors import InputError
from qlora_engine.tokenizer import read_tokenizer


@pytest.mark.parametrize(
    "family", ["LlamaConfig", "GPT2Config", "Qwen3Config", "BertConfig", "T5Config", "MistralConfig"]
)
@pytest.mark.parametrize("left", [(), ("tokenizer_config.json",)], ids=["nothing left", "a config left"])
def test_none(family: str, left: tuple[str, ...], tmp_path: Path) -> None:
    import transformers

    getattr(transformers, family)().save_pretrained(tmp_path)
    for name in left:
        (tmp_path / name).write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(InputError) as caught:
        read_tokenizer(tmp_path)
    head = f"{tmp_path} has no tokenizer to read texts with: "
    assert str(caught.value).startswith(head)
    assert str(caught.value) != head


def test_one(tmp_path: Path, make_tokenizer: Any) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    text = "A model in few bits."
    assert read_tokenizer(tmp_path)(text)["input_ids"] == make_tokenizer()(text)["input_ids"]


def test_bytes_need_no_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    assert read_tokenizer(tmp_path)("ab", add_special_tokens=False)["input_ids"] == [100, 101]
