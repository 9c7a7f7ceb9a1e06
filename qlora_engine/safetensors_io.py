"""One safetensors file: header checked before anything is allocated, tensors read and written one by one.

Reading copies the bytes of one tensor with ``pread`` instead of mapping the file: the memory in use is then
that of the tensor alone, and a file that another process truncates is an error here, not a SIGBUS.

Source: the format is specified in the README of https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import InputError
from .files import check_json_size, no_duplicates

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_DIMS = 64  # torch's
COPY_BYTES = 8 << 20  # what a copy from file to file holds in memory

# Every dtype that the format has, with its bits; those torch can hold as such are in TORCH_DTYPES.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
    "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "C64": torch.complex64, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
FLOAT_DTYPES = ("F16", "BF16", "F32", "F64")
# config.json's name of the dtype that a model has in memory; double precision is no model's.
DTYPE_OF_STORED = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float32"}
STORED_DTYPE = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


class ReadError(OSError):
    """A file that was whole when it was opened is not any more: gone, shorter, or unreadable."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: ``nbytes`` from ``begin`` (counted from the start of ``path``)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    begin: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return _numel(self.shape)

    def read(self) -> Tensor:
        """The tensor, in memory of its own, in the dtype it has on disk.

        Raises:
            InputError: torch has no such dtype.
            ReadError: the file is not what its header said.
        """
        if self.dtype not in TORCH_DTYPES:
            raise InputError(
                f"{self.path}: tensor '{self.name}' has dtype {self.dtype}, which torch cannot hold"
            )
        data = torch.empty(self.nbytes, dtype=torch.uint8)
        _read_into(self.path, data.numpy().data, self.begin)
        return data.view(TORCH_DTYPES[self.dtype]).reshape(self.shape)

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The tensor's bytes in pieces of at most ``COPY_BYTES``."""
        buffer = memoryview(bytearray(min(COPY_BYTES, self.nbytes)))
        for start in range(0, self.nbytes, COPY_BYTES):
            piece = buffer[: min(COPY_BYTES, self.nbytes - start)]
            _read_into(self.path, piece, self.begin + start)
            yield piece


class Writable(Protocol):
    """What ``write_file`` takes: a ``TensorEntry``, a ``DenseTensor``, or anything that streams its bytes."""

    @property
    def name(self) -> str:
        """Name in the file."""
        ...

    @property
    def dtype(self) -> str:
        """One of ``DTYPE_BITS``."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        ...

    @property
    def nbytes(self) -> int:
        """Exact number of bytes that ``chunks`` will give."""
        ...

    def chunks(self) -> Iterable[bytes | memoryview]:
        """The bytes, row-major, little-endian."""
        ...


@dataclass(frozen=True)
class DenseTensor:
    """A tensor in memory, to be written."""

    name: str
    tensor: Tensor

    @property
    def dtype(self) -> str:
        """The format's name of the dtype."""
        return DTYPE_NAMES[self.tensor.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.tensor.numel() * self.tensor.element_size()

    def chunks(self) -> Iterator[memoryview]:
        """The bytes at once (no copy for a contiguous tensor on the CPU)."""
        data = self.tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        yield data.numpy().data


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _read_into(path: Path, target: memoryview, begin: int) -> None:
    """Fill ``target`` from ``path``; a read may return less than asked (2 GB is Linux' most), so repeat."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ReadError(error.errno, f"cannot read {path}: {error.strerror}") from error
    try:
        done = 0
        while done < len(target):
            count = os.preadv(file, [target[done:]], begin + done)
            if count == 0:
                size = os.fstat(file).st_size
                raise ReadError(
                    f"{path} is truncated: {size} bytes, tensor data needed to byte {begin + len(target)}"
                )
            done += count
    finally:
        os.close(file)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _parse_entry(path: Path, name: str, entry: Any, data_begin: int, data_bytes: int) -> TensorEntry:
    if not isinstance(entry, dict):
        raise ValueError(f"tensor '{name}' is not an object")
    if _LONE_SURROGATE.search(name):  # JSON can escape one, UTF-8 cannot hold it
        raise ValueError(f"the name {name!a:.60} of a tensor is not text (half of a surrogate pair)")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"tensor '{name}' has unknown dtype {dtype!r:.60}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_count(size) for size in shape):
        raise ValueError(f"tensor '{name}' has a bad shape {shape!r:.60}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise ValueError(f"tensor '{name}' has bad data_offsets {offsets!r:.60}")
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise ValueError(
            f"tensor '{name}' lies at bytes {begin} to {end} of {data_bytes}: truncated or corrupt"
        )
    bits = _numel(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (end - begin):
        raise ValueError(
            f"tensor '{name}' of shape {shape} and dtype {dtype} cannot take {end - begin} bytes"
        )
    return TensorEntry(name, dtype, tuple(shape), path, data_begin + begin, end - begin)


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Read and check the header of a safetensors file; nothing else is read.

    Returns:
        The tensors by name, in the order of their bytes, and the file's metadata.

    Raises:
        InputError: not a safetensors file, or sizes, offsets, dtypes or names that do not fit together.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        try:
            if len(start) < 8:
                raise ValueError(f"only {size} bytes, not even a header")
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(
                    f"header of {length} bytes in a file of {size}: truncated, or not safetensors"
                )
            return _parse_header(path, file.read(length), 8 + length, size - 8 - length)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not a valid safetensors file: {error}") from error


def _parse_header(
    path: Path, text: bytes, data_begin: int, data_bytes: int
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    if not text.startswith(b"{"):
        raise ValueError("the header does not start with '{'")
    check_json_size(text)
    header = json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is not a map from text to text")
    entries = [_parse_entry(path, name, entry, data_begin, data_bytes) for name, entry in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.nbytes))
    position = data_begin
    for entry in entries:
        if entry.begin != position:
            raise ValueError(f"tensor '{entry.name}' overlaps its neighbour or leaves a gap")
        position += entry.nbytes
    if position != data_begin + data_bytes:
        raise ValueError(f"{data_begin + data_bytes - position} bytes at the end belong to no tensor")
    return {entry.name: entry for entry in entries}, metadata


def write_file(path: Path, tensors: Sequence[Writable], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a new safetensors file and flush it to the disk.

    The wider dtypes come first, so that every tensor lies at a multiple of its element's size. A crash
    leaves a partial file: give a temporary ``path`` and rename it afterwards.

    Args:
        path: File to write; replaced if it exists.
        tensors: Read one at a time, in pieces.
        metadata: Text to text, into the header.

    Raises:
        OSError: what the disk says (full, read-only, ...).
    """
    ordered = sorted(tensors, key=lambda tensor: -DTYPE_BITS[tensor.dtype])
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for tensor in ordered:
        if tensor.name in header:
            raise ValueError(f"two tensors are named '{tensor.name}'")
        end = position + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in ordered:
            begin = file.tell()
            for chunk in tensor.chunks():
                file.write(chunk)
            if file.tell() - begin != tensor.nbytes:
                raise RuntimeError(f"'{tensor.name}' gave {file.tell() - begin} bytes, not {tensor.nbytes}")
        file.flush()
        os.fsync(file.fileno())
