"""Which patterns of an adapter's config are taken, and which could take for ever."""

from __future__ import annotations

import re
import time

import pytest

from qlora_engine.patterns import MAX_LENGTH, MAX_REPEATS, why_slow

FINE = [
    "q_proj",
    r".*\.(q|k|v|o)_proj",
    r"^model\.layers\.(\d|1\d)\.self_attn\.(q_proj|k_proj)$",
    r"model\.layers\.\d+\..*_proj",
    r"(.*\.)?(encoder|decoder)\..*\.[a-z]+_proj",
    r"(?:layers|blocks)\.(?!0\.)[0-9]+\.mlp",
    r"[\w.]+\.down_proj",
    r"a{2,5}b*",
    r"(x{1,3}y){1,4}z",
]
SLOW = [
    ("(a+)+$", "a repeat within a repeat"),
    ("((a*)b)*", "a repeat within a repeat"),
    ("(?:a+?)+?x", "a repeat within a repeat"),
    ("(a{2,})*", "a repeat within a repeat"),
    ("(?=(a+)+)b", "a repeat within a repeat"),
    ("(a|ab)*c", "alternatives within a repeat"),
    (".*" * (MAX_REPEATS + 1) + "x", f"{MAX_REPEATS + 1} repeats"),
    ("a" * (MAX_LENGTH + 1), f"{MAX_LENGTH + 1} characters"),
]
NAME = "model.layers.11.self_attn.q_proj" + "a" * 40 + "!"


@pytest.mark.parametrize("pattern", FINE)
def test_patterns_in_use_are_taken(pattern: str) -> None:
    assert why_slow(pattern) is None
    began = time.process_time()
    re.fullmatch(pattern, NAME)
    re.match(rf"(.*\.)?({pattern})$", NAME)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(("pattern", "reason"), SLOW)
def test_patterns_that_backtrack_are_named(pattern: str, reason: str) -> None:
    assert reason in (why_slow(pattern) or "")


def test_no_pattern_at_all() -> None:
    with pytest.raises(re.error):
        why_slow("(")
    with pytest.raises(re.error):
        why_slow("(" * 900 + ")" * 900)


def test_as_many_repeats_as_allowed_end_in_time() -> None:
    pattern = ".*" * MAX_REPEATS + "x"
    assert why_slow(pattern) is None
    began = time.process_time()
    assert re.fullmatch(pattern, NAME[:60]) is None
    assert time.process_time() - began < 60
