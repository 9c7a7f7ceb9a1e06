"""Reading and writing one safetensors file: equal to the library, and hostile headers refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qlora_engine.errors import InputError
from qlora_engine.safetensors_io import (
    COPY_BYTES,
    DTYPE_BITS,
    DTYPE_NAMES,
    TORCH_DTYPES,
    DenseTensor,
    ReadError,
    read_header,
    write_file,
)

# What the library can write; its releases before 0.6 had no complex numbers.
_OLD = tuple(map(int, safetensors.__version__.split(".")[:2])) < (0, 6)
LIBRARY_DTYPES = [dtype for dtype in DTYPE_NAMES if dtype != torch.complex64 or not _OLD]


def raw(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int = 0, end: int = 8, **other: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [begin, end]} | other


@pytest.mark.parametrize("dtype", LIBRARY_DTYPES)
def test_write_file_then_library_reads(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "matrix": torch.randint(0, 2, (3, 5)).to(dtype),
        "scalar": torch.ones(()).to(dtype),
        "empty": torch.zeros(0, 4).to(dtype),
        "transposed": torch.randint(0, 2, (4, 2)).to(dtype).T,
    }
    path = tmp_path / "a.safetensors"
    write_file(path, [DenseTensor(name, value) for name, value in tensors.items()], {"format": "pt"})
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == dtype
        assert loaded[name].shape == value.shape
        assert loaded[name].contiguous().view(-1).tolist() == value.contiguous().view(-1).tolist()
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", LIBRARY_DTYPES)
def test_read_header_of_library_file(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "b": torch.randint(0, 2, (3, 5)).to(dtype),
        "a": torch.ones(()).to(dtype),
        "c": torch.zeros(0).to(dtype),
    }
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, {"note": "x"})
    entries, metadata = read_header(path)
    assert metadata == {"note": "x"}
    for name, value in tensors.items():
        got = entries[name].read()
        assert got.dtype == dtype
        assert got.shape == value.shape
        assert got.view(-1).tolist() == value.view(-1).tolist()
        assert b"".join(bytes(chunk) for chunk in entries[name].chunks()) == bytes(
            value.reshape(-1).view(torch.uint8).tolist()
        )


def test_write_file_aligns_and_copies_in_pieces(tmp_path: Path) -> None:
    numel = COPY_BYTES + 12345
    big = torch.arange(numel).to(torch.uint8)
    write_file(
        tmp_path / "a",
        [DenseTensor("odd", big), DenseTensor("f", torch.ones(3)), DenseTensor("h", torch.ones(3).half())],
    )
    entries, _ = read_header(tmp_path / "a")
    assert all(e.begin * 8 % DTYPE_BITS[e.dtype] == 0 for e in entries.values())
    write_file(tmp_path / "b", list(entries.values()))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert torch.equal(read_header(tmp_path / "b")[0]["odd"].read(), big)


def test_write_file_refuses_two_of_a_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two tensors are named 'a'"):
        write_file(tmp_path / "a", [DenseTensor("a", torch.ones(1)), DenseTensor("a", torch.ones(1))])


BAD_HEADERS = {
    "not json": (b"{nonsense", b""),
    "not an object": (b"[1, 2]", b""),
    "not utf-8": (b'{"\xff": 1}', b""),
    "deep": (b'{"a":' + b"[" * 100_000, b""),
    "huge number": (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', bytes(8)),
    "tensor not an object": ({"a": 3}, b""),
    "unknown dtype": ({"a": entry(dtype="F33")}, bytes(8)),
    "dtype not text": ({"a": entry(dtype=[])}, bytes(8)),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "negative size": ({"a": entry(shape=[-2])}, bytes(8)),
    "fractional size": ({"a": entry(shape=[2.0])}, bytes(8)),
    "boolean size": ({"a": entry(shape=[True, 2])}, bytes(8)),
    "many dimensions": ({"a": entry(shape=[1] * 100 + [2])}, bytes(8)),
    "size overflows": ({"a": entry(shape=[2**62, 2**62, 2**62])}, bytes(8)),
    "size beyond torch's": ({"a": entry(0, 0, shape=[0, 2**63])}, b""),
    "no offsets": ({"a": entry() | {"data_offsets": None}}, bytes(8)),
    "offsets no list": ({"a": entry() | {"data_offsets": "08"}}, bytes(8)),
    "offsets fractional": ({"a": entry() | {"data_offsets": [0.0, 8.0]}}, bytes(8)),
    "three offsets": ({"a": entry() | {"data_offsets": [0, 4, 8]}}, bytes(8)),
    "one offset": ({"a": entry() | {"data_offsets": [0]}}, bytes(8)),
    "offsets reversed": ({"a": entry(8, 0)}, bytes(8)),
    "offset negative": ({"a": entry(-8, 0)}, bytes(8)),
    "past the end": ({"a": entry(0, 8)}, bytes(7)),
    "far past the end": ({"a": entry(0, 2**60, shape=[2**58])}, bytes(8)),
    "shape does not fit": ({"a": entry(shape=[3])}, bytes(8)),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "gap": ({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),
    "rest": ({"a": entry(0, 8)}, bytes(9)),
    "metadata not text": ({"__metadata__": {"a": 1}}, b""),
    "metadata not a map": ({"__metadata__": [1]}, b""),
    "name not text": (b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', b""),
    "name twice": (b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{}}', b""),
}


@pytest.mark.parametrize("case", list(BAD_HEADERS))
def test_read_header_refuses(tmp_path: Path, case: str) -> None:
    path = raw(tmp_path / "bad.safetensors", *BAD_HEADERS[case])
    with pytest.raises(InputError, match=r"bad.safetensors is not a valid safetensors file: ") as caught:
        read_header(path)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("data", [b"", b"1234567", (10**6).to_bytes(8, "little") + b"{}", b"\xff" * 64])
def test_read_header_refuses_no_header(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(InputError, match="not a valid safetensors file"):
        read_header(tmp_path / "bad")


def test_read_notices_truncation(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_file(path, [DenseTensor("a", torch.ones(1000))])
    found = read_header(path)[0]["a"]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ReadError, match="truncated"):
        found.read()
    with pytest.raises(ReadError, match="truncated"):
        list(found.chunks())
    path.unlink()
    with pytest.raises(ReadError, match="cannot read"):
        found.read()


@settings(max_examples=300)
@given(data=st.data())
def test_read_header_never_crashes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A valid file with bytes flipped, cut or inserted is read right or refused with our error."""
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    write_file(
        path, [DenseTensor("x.weight", torch.ones(4, 3)), DenseTensor("y", torch.ones(5).half())], {"k": "v"}
    )
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(whole) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert"])):
            case "flip":
                whole[position] = data.draw(st.integers(0, 255))
            case "cut":
                del whole[max(position, 1) :]
            case _:
                whole[position:position] = data.draw(st.binary(max_size=9))
    path.write_bytes(whole)
    try:
        entries, _ = read_header(path)
    except InputError:
        return
    for found in entries.values():
        assert found.begin + found.nbytes <= len(whole)
        assert found.numel * DTYPE_BITS[found.dtype] == found.nbytes * 8


def test_dtypes_have_their_widths() -> None:
    widths = {name: 8 * dtype.itemsize for name, dtype in TORCH_DTYPES.items()}
    widths |= {f"U{bits}": bits for bits in (16, 32, 64)}  # torch holds them, as codes of nothing here
    assert {name: DTYPE_BITS[name] for name in widths} == widths


def test_a_tensor_of_as_many_dimensions_as_torch_has(tmp_path: Path) -> None:
    write_file(tmp_path / "deep", [DenseTensor("a", torch.ones([1] * 63 + [2]))])
    assert read_header(tmp_path / "deep")[0]["a"].read().ndim == 64


@pytest.mark.parametrize("length", range(1, 9))
def test_data_starts_at_a_multiple_of_eight(tmp_path: Path, length: int) -> None:
    write_file(tmp_path / "file", [DenseTensor("a" * length, torch.ones(2))])
    assert int.from_bytes((tmp_path / "file").read_bytes()[:8], "little") % 8 == 0
