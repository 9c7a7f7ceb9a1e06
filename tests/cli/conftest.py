"""What the tests of fine-tuning share: rows to train on, a dense model with a tokenizer, and it quantised."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from .command import invoke


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"{i} plus one is", "completion": f" {i + 1}."} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="session")
def dense_model(make_checkpoint: Any, make_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dense"
    shutil.copytree(make_checkpoint("llama"), folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def quantised(dense_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base") / "out"
    assert invoke(dense_model, out, "--bits", 4, "--rank", 4, "--quiet").code == 0
    return out
