"""A checkpoint folder in Hugging Face layout: tensors found and checked, shards planned and named."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import InputError
from .files import read_json_object, write_json
from .safetensors_io import FLOAT_DTYPES, MAX_HEADER_BYTES, TensorEntry, read_header

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = WEIGHTS_FILE + ".index.json"
PICKLE_GLOBS = ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth", "*.ckpt")
# What a model's user needs beside weights and config.json. A README would describe another model.
SIDE_FILES = (
    "generation_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "*.jinja", "*.model", "*.tiktoken", "spiece*", "sentencepiece*",
    "preprocessor_config.json", "processor_config.json", "image_processor*.json",
    "video_preprocessor_config.json", "additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*",
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "[0-9]_*/config.json",
)  # fmt: skip
_DIGITS = 18  # Python refuses to read an integer of thousands
_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(text: str | int) -> int:
    """Bytes of ``"5GB"``, ``"500 MiB"``, ``"1000"``...

    Raises:
        InputError: not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(text).upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size <= 0:
        raise InputError(f"'{text}' is not a size; give one like 5GB, 500MB or 2GiB")
    return size


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """Sort key by which ``layers.2`` comes before ``layers.10``; more digits than a layer has are text."""
    return [
        (0, int(part), "") if part.isdecimal() and len(part) <= _DIGITS else (1, 0, part)
        for part in name.split(".")
    ]


def is_inside(path: Path, folder: Path) -> bool:
    """Whether ``path``, links followed, lies in ``folder``, or in the blobs of its hub cache."""
    real = path.resolve()
    home = folder.resolve()
    roots = [home]
    if home.parent.name == "snapshots":
        roots.append(home.parent.parent / "blobs")
    return any(real.is_relative_to(root) for root in roots)


def _shard_path(folder: Path, name: Any, index: Path) -> Path:
    plain = isinstance(name, str) and name not in ("", ".", "..") and PurePosixPath(name).name == name
    if not plain or "\\" in name or "\0" in name:
        raise InputError(f"{index}: shard name {name!r:.80} is not a plain file name in the same folder")
    path = folder / name
    if not path.is_file():
        raise InputError(f"{index} names the shard {name}, which is not in {folder}")
    return path


def _find_shards(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files, and the index's map from tensor to file if there is an index."""
    index = folder / INDEX_FILE
    if index.is_file():
        weight_map = read_json_object(index, strict=True).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index} has no weight_map")
        names = {repr(name): name for name in weight_map.values()}
        return [_shard_path(folder, names[key], index) for key in sorted(names)], weight_map
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE], None
    pickles = sorted({path.name for glob in PICKLE_GLOBS for path in folder.glob(glob)})
    if pickles:
        raise InputError(
            f"{folder} holds pickled weights ({pickles[0]}), which can run code when they are read; convert "
            'them where you trust them: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('CONVERTED')\" (or AutoModel)"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    hint = f" (it has {others[0]}, which transformers would not load either)" if others else ""
    raise InputError(f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}{hint}")


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose headers were read and found sound; ``tensors`` in natural order of their names."""

    folder: Path
    config: dict[str, Any]
    shards: tuple[Path, ...]
    tensors: dict[str, TensorEntry]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read config.json, the index and every shard's header; no tensor.

        Raises:
            InputError: not a model folder, a missing, truncated or corrupt file, an index that names files
                outside the folder or tensors that are not there, pickled weights.
            OSError: a file cannot be read.
        """
        if not folder.is_dir():
            raise InputError(f"no such folder: {folder}")
        if not (folder / CONFIG_FILE).is_file():
            raise InputError(f"{folder} is not a model: it has no {CONFIG_FILE}")
        config = read_json_object(folder / CONFIG_FILE)
        shards, weight_map = _find_shards(folder)
        tensors: dict[str, TensorEntry] = {}
        for shard in shards:
            if not is_inside(shard, folder):
                raise InputError(f"{shard} is a link to {shard.resolve()}, outside the folder; copy the file")
            for name, entry in read_header(shard)[0].items():
                if weight_map is not None and weight_map.get(name, shard.name) != shard.name:
                    continue
                if name in tensors:
                    raise InputError(f"tensor '{name}' is in both {tensors[name].path.name} and {shard.name}")
                tensors[name] = entry
        missing = [name for name in weight_map or () if name not in tensors]
        if missing:
            raise InputError(
                f"{folder}: {len(missing)} tensors of the index are in no shard, among them '{missing[0]}'"
            )
        ordered = {name: tensors[name] for name in sorted(tensors, key=natural_order)}
        return cls(folder, config, tuple(shards), ordered)

    @cached_property
    def float_dtype(self) -> str:
        """The floating dtype (safetensors' name) that most elements have."""
        counts = dict.fromkeys(FLOAT_DTYPES, 0)
        for entry in self.tensors.values():
            if entry.dtype in counts:
                counts[entry.dtype] += entry.numel
        return max(counts, key=lambda name: counts[name])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def identity(self) -> dict[str, str]:
        """What tells whether the input changed: size, time and header hash of each weight file."""
        found = {CONFIG_FILE: hashlib.sha256((self.folder / CONFIG_FILE).read_bytes()).hexdigest()}
        for shard in self.shards:
            facts = shard.stat()
            with shard.open("rb") as file:
                length = min(int.from_bytes(file.read(8), "little"), MAX_HEADER_BYTES)
                digest = hashlib.sha256(file.read(length)).hexdigest()
            found[shard.name] = f"{facts.st_size} {facts.st_mtime_ns} {digest}"
        return found

    def side_files(self, *, code: bool = False) -> Iterator[Path]:
        """The files beside the weights that belong to the model, as paths relative to the folder.

        Args:
            code: The model's own Python files too.

        Raises:
            InputError: one of them is a link that leads out of the folder, or to nothing.
        """
        globs = (*SIDE_FILES, "*.py") if code else SIDE_FILES
        found = {path for glob in globs for path in self.folder.glob(glob)}
        for path in sorted(found):
            if path.is_symlink() and not path.exists():  # as after a download that was cut off
                raise InputError(f"{path} is a link to {os.readlink(path)}, which is not there")
            if not path.is_file():
                continue
            if not is_inside(path, self.folder):
                raise InputError(f"{path} is a link to {path.resolve()}, outside the folder; copy the file")
            if not path.name.endswith((".safetensors", ".bin")):
                yield path.relative_to(self.folder)


def split_shards(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Cut a list of sizes into consecutive runs of at most ``limit`` bytes (a larger one stands alone).

    Returns:
        The positions in each run, at least one run.
    """
    runs: list[list[int]] = [[]]
    used = 0
    for position, size in enumerate(sizes):
        if runs[-1] and used + size > limit:
            runs.append([])
            used = 0
        runs[-1].append(position)
        used += size
    return runs


def shard_names(count: int) -> list[str]:
    """File names of ``count`` shards as transformers writes them; one shard needs no number."""
    if count == 1:
        return [WEIGHTS_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def index_weights(folder: Path) -> int:
    """Write the index of the weight files in ``folder`` if there are several; whatever else is there goes.

    Returns:
        Bytes of all tensors in them.
    """
    shards = sorted(folder.glob("model*.safetensors"))
    for path in folder.iterdir():
        if path not in shards:  # what an earlier run wrote before it was cut off
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    headers = {shard: read_header(shard)[0] for shard in shards}
    total = sum(entry.nbytes for entries in headers.values() for entry in entries.values())
    if len(shards) > 1:
        weight_map = {name: shard.name for shard, entries in headers.items() for name in entries}
        write_index(folder, weight_map, total)
    return total


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Write ``model.safetensors.index.json``."""
    write_json(
        folder / INDEX_FILE,
        {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))},
    )
