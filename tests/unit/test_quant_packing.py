"""quant.packing: the bit stream, by hand and round trip."""

import pytest
import torch

from quant import packing


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("numel", [0, 1, 2, 3, 5, 7, 8, 9, 63, 100, 257])
def test_unpack_inverts_pack(bits, numel):
    codes = torch.randint(0, 2**bits, (numel,), dtype=torch.uint8)
    packed = packing.pack(codes, bits)
    assert packed.shape == (packing.packed_bytes(numel, bits),)
    assert torch.equal(packing.unpack(packed, bits, numel), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_pack_is_a_big_endian_bit_stream(bits):
    codes = torch.randint(0, 2**bits, (29,), dtype=torch.uint8)
    stream = "".join(f"{code:0{bits}b}" for code in codes.tolist())
    stream += "0" * (-len(stream) % 8)
    expected = [int(stream[i : i + 8], 2) for i in range(0, len(stream), 8)]
    assert packing.pack(codes, bits).tolist() == expected


def test_pack_fills_the_last_byte_with_the_given_code():
    assert packing.pack(torch.tensor([1], dtype=torch.uint8), 4, fill=7).tolist() == [0x17]
    assert packing.pack(torch.tensor([1], dtype=torch.uint8), 3, fill=0b101).tolist() == [0b00110110]


def test_pack_and_unpack_refuse_bad_input():
    codes = torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="5 bits a code; allowed: 2, 3, 4, 8"):
        packing.pack(codes, 5)
    with pytest.raises(TypeError, match=r"torch\.int64"):
        packing.pack(codes.long(), 4)
    with pytest.raises(TypeError, match=r"torch\.int64"):
        packing.unpack(codes.long(), 4, 4)
    with pytest.raises(ValueError, match=r"4 bytes hold fewer than 9 codes of 4 bits \(5 bytes\)"):
        packing.unpack(codes, 4, 9)
