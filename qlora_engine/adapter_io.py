"""PEFT's adapter folder: the names of its files and keys, written atomically."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .config import LoraConfig
from .files import rename_into_place
from .fingerprint import Fingerprint
from .safetensors_io import Writable, write_file

ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."


def factor_names(path: str, kind: str) -> tuple[str, str]:
    """Keys of A and B of the module ``path`` on disk; an embedding's differ and end without ``.weight``."""
    if kind == "embedding":
        return f"{KEY_PREFIX}{path}.lora_embedding_A", f"{KEY_PREFIX}{path}.lora_embedding_B"
    return f"{KEY_PREFIX}{path}.lora_A.weight", f"{KEY_PREFIX}{path}.lora_B.weight"


def write_adapter(
    folder: Path, tensors: Iterable[Writable], config: LoraConfig, fingerprint: Fingerprint | None = None
) -> None:
    """Write an adapter folder; the config comes last, so that an incomplete folder is no adapter.

    Args:
        folder: Made if it is not there.
        tensors: Named as ``factor_names`` says; streamed, one at a time.
        config: Written as it is.
        fingerprint: Of the quantised base that the factors were solved for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{ADAPTER_WEIGHTS_FILE}.tmp"
    write_file(temporary, list(tensors), {"format": "pt"})
    rename_into_place(temporary, folder / ADAPTER_WEIGHTS_FILE)
    if fingerprint is not None:
        fingerprint.write(folder)
    config.save_pretrained(folder)
