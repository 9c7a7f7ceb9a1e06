"""quant.formats and quant.spec: the tables and the value that picks one."""

import pytest

from quant import formats
from quant.formats import Format
from quant.spec import QuantSpec


@pytest.mark.parametrize("name", formats.names())
def test_get_gives_a_sound_table(name):
    fmt = formats.get(name)
    assert fmt.name == name
    assert len(fmt.levels) == 2**fmt.bits
    assert fmt.source
    assert fmt.unit > 0
    assert 0.0 in fmt.levels, "zero weights must stay zero"
    assert fmt.levels[fmt.zero_code] == 0.0
    if not fmt.affine:
        assert max(fmt.levels) >= fmt.unit
        assert fmt.signed or min(fmt.levels) <= -fmt.unit


def test_names_lists_what_the_folder_holds():
    assert {"nf4", "nf3", "nf2", "fp4", "int8", "int4", "int3", "int2"} <= set(formats.names())
    assert {"uint8", "uint4", "uint3", "uint2"} <= set(formats.names())
    assert list(formats.names()) == sorted(formats.names())


def test_get_refuses_an_unknown_name_and_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown format 'nf5'; known formats: .*nf4"):
        formats.get("nf5")


def test_format_refuses_a_wrong_number_of_levels_or_bits():
    with pytest.raises(ValueError, match="3 levels for 2 bits, not 4"):
        Format("x", 2, (0.0, 0.5, 1.0), False, None, "here")
    with pytest.raises(ValueError, match="5 bits; allowed"):
        Format("x", 5, (0.0,) * 32, False, None, "here")


def test_bits_per_weight_of_the_limit():
    assert QuantSpec("nf4").bits_per_weight() == 4.5
    assert QuantSpec("nf4", 64, True).bits_per_weight() == pytest.approx(
        4 + 8 / 64 + 32 / (64 * 256)
    )  # 4.127
    assert QuantSpec("uint4").bits_per_weight() == 4 + 40 / 64
    assert QuantSpec("int3", 128).bits_per_weight() == 3.25


def test_bits_per_weight_counts_short_blocks():
    spec = QuantSpec("nf4", 64)
    assert spec.nbytes(65) == 33 + 8
    assert spec.bits_per_weight(65) == 8 * 41 / 65
    assert spec.bits_per_weight(0) == 0


def test_spec_round_trips_through_a_dict():
    spec = QuantSpec("int3", 128, True)
    assert spec.to_dict() == {"format": "int3", "block_size": 128, "double_quant": True}
    assert QuantSpec.from_dict(spec.to_dict()) == spec
    assert QuantSpec.from_dict({}) == QuantSpec("nf4", 64, False)
    assert hash(spec) == hash(QuantSpec("int3", 128, True))


@pytest.mark.parametrize("size", [0, 8, 15, 48, 100, 8192, -64])
def test_spec_refuses_a_block_size(size):
    with pytest.raises(ValueError, match=rf"block_size {size} is not a power of two in \[16, 4096\]"):
        QuantSpec("nf4", size)


def test_spec_refuses_other_types_and_fields():
    with pytest.raises(TypeError, match="block_size must be an int"):
        QuantSpec("nf4", 64.0)
    with pytest.raises(TypeError, match="block_size must be an int"):
        QuantSpec("nf4", True)
    with pytest.raises(TypeError, match="double_quant must be a bool"):
        QuantSpec("nf4", 64, 1)
    with pytest.raises(ValueError, match="unknown format"):
        QuantSpec("nf5")
    with pytest.raises(ValueError, match=r"unknown QuantSpec fields \['blocksize'\]"):
        QuantSpec.from_dict({"blocksize": 64})
