"""Hessians in one safetensors file, written one by one as they are computed and read one by one when needed.

A full H is stored as its upper triangle, row by row. The header of a safetensors file comes first but is
known last: room is left for it, and filled with spaces, which the format allows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_engine.errors import InputError
from qlora_engine.files import rename_into_place
from qlora_engine.hessian import unpack_upper
from qlora_engine.safetensors_io import MAX_HEADER_BYTES, TensorEntry, read_header

_UPPER, _DIAGONAL = ".upper", ".diagonal"
VECTORS = ("mean", "sensitivity")


class HessianWriter:
    """Writes to a temporary name beside ``path``; ``close`` gives it its name, ``abort`` takes it away.

    Args:
        path: File to write; replaced if it exists.
        header_bytes: Room for tensor names and metadata.

    Raises:
        OSError: what the disk says.
    """

    def __init__(self, path: Path, *, header_bytes: int) -> None:
        self.path = path
        self._room = min(-(-header_bytes // 8) * 8, MAX_HEADER_BYTES)
        self._header: dict[str, Any] = {}
        self._temporary = path.with_name(path.name + ".tmp")
        self._file = self._temporary.open("wb")
        self._file.write(self._room.to_bytes(8, "little"))
        self._file.write(b" " * self._room)
        self._position = 0

    def add(self, name: str, hessian: Tensor) -> None:
        """Append H, float32 (in, in) or its diagonal (in,)."""
        dense = hessian.detach().to("cpu", torch.float32).contiguous()
        begin = self._position
        if dense.ndim == 1:
            self._write(dense)
        else:
            for row in range(dense.shape[0]):
                self._write(dense[row, row:])
        key = name + (_DIAGONAL if dense.ndim == 1 else _UPPER)
        shape = [(self._position - begin) // 4]
        self._header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, self._position]}

    def add_vector(self, kind: str, name: str, values: Tensor) -> None:
        """Append what else is known of a layer, one of ``VECTORS``, as float32 (n,)."""
        begin = self._position
        self._write(values.detach().to("cpu", torch.float32).contiguous())
        entry = {"dtype": "F32", "shape": [values.numel()], "data_offsets": [begin, self._position]}
        self._header[f"{name}.{kind}"] = entry

    def _write(self, values: Tensor) -> None:
        self._position += self._file.write(values.numpy().data)

    def close(self, metadata: Mapping[str, str]) -> None:
        """Write the header and flush.

        Raises:
            RuntimeError: the metadata outgrew the room that was left.
        """
        text = json.dumps({"__metadata__": dict(metadata), **self._header}, separators=(",", ":")).encode()
        if len(text) > self._room:
            self.abort()
            raise RuntimeError(f"header of {len(text)} bytes for a room of {self._room}")
        self._file.seek(8)
        self._file.write(text)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        rename_into_place(self._temporary, self.path)

    def abort(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


class HessianFile(Mapping[str, Tensor]):
    """Name -> H of a file that ``HessianWriter`` wrote; read anew at each look.

    Attributes:
        metadata: Text to text.
        vectors: One of ``VECTORS`` -> name -> (n,).

    Raises:
        InputError: not such a file.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise InputError(f"no such calibration file: {path}")
        entries, self.metadata = read_header(path)
        self._entries: dict[str, TensorEntry] = {}
        self.vectors: dict[str, dict[str, Tensor]] = {kind: {} for kind in VECTORS}
        for key, entry in entries.items():
            name, _, kind = key.rpartition(".")
            if entry.dtype != "F32" or len(entry.shape) != 1 or kind not in ("upper", "diagonal", *VECTORS):
                raise InputError(f"{path}: tensor '{key}' is not a Hessian; is this a calibration file?")
            if kind in VECTORS:
                self.vectors[kind][name] = entry.read()
            else:
                self._entries[name] = entry

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        values = entry.read()
        if entry.name.endswith(_DIAGONAL):
            return values
        width = int(((8 * entry.numel + 1) ** 0.5 - 1) / 2)
        if width * (width + 1) // 2 != entry.numel:
            raise InputError(
                f"{entry.path}: '{entry.name}' has {entry.numel} values, not those of a triangle"
            )
        return unpack_upper(values, width)

    def __iter__(self) -> Any:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
