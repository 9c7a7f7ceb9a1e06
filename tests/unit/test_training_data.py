"""Rows to sequences: what is trained on, what is refused, packing, and files read in pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_engine.errors import InputError
from qlora_engine.training.data import IGNORED, Collator, Example, RowEncoder, Rows, Sequences, pack, split


class Letters:
    """A tokenizer of single characters: id = code point, 1 begins and 2 ends a text."""

    eos_token_id = 2
    chat_template: str | None = "yes"

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, Any]:
        return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}

    def apply_chat_template(
        self, messages: Any, add_generation_prompt: bool = False, tools: Any = None, **_: Any
    ) -> dict[str, Any]:
        text = "" if tools is None else f"{len(tools)} tools;"
        text += "".join(f"<{m['role'][0]}>{m['content']};" for m in messages)
        return {"input_ids": [ord(c) for c in text + "<a>" * add_generation_prompt]}


def written(labels: list[int]) -> str:
    return "".join("_" if label == IGNORED else chr(label) for label in labels)


def test_completion_alone_is_trained_on() -> None:
    example = RowEncoder(Letters(), 100)({"prompt": "ab", "completion": "cd"})
    assert example.ids == [1, 97, 98, 99, 100, 2]
    assert written(example.labels) == "___cd\x02"


def test_everything_is_trained_on_where_asked() -> None:
    example = RowEncoder(Letters(), 100, everything=True)({"prompt": "ab", "completion": "cd"})
    assert example.labels == example.ids


def test_text_is_trained_on_and_ended() -> None:
    assert RowEncoder(Letters(), 100)({"text": "ab"}).labels == [1, 97, 98, 2]
    assert RowEncoder(Letters(), 3)({"text": "abcdef"}).ids == [1, 97, 98]


def test_chat_trains_on_what_the_assistant_says() -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    example = RowEncoder(Letters(), 100)({"messages": messages})
    assert written(example.ids) == "<u>hi;<a>yo;<u>b;<a>c;"
    assert written(example.labels) == "_________yo;________c;"


def test_a_chat_tells_of_its_tools() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    example = RowEncoder(Letters(), 100)({"messages": messages, "tools": [{}, {}]})
    assert written(example.ids) == "2 tools;<u>hi;<a>yo;"
    assert written(example.labels) == "_" * 17 + "yo;"


def test_a_cut_row_says_what_is_left_out() -> None:
    assert RowEncoder(Letters(), 3)({"text": "abcdef"}).left_out == 5
    assert RowEncoder(Letters(), 8)({"text": "abcdef"}).left_out == 0


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (3, "expected an object"),
        ({}, "has the keys"),
        ({"text": 5}, "not a string"),
        ({"text": ""}, "nothing to train on"),
        ({"prompt": "x" * 200, "completion": "y"}, "nothing to train on in its first 100"),
        ({"messages": "hi"}, "list of objects"),
        ({"messages": [{"role": "user", "content": "only asks"}]}, "nothing to train on"),
    ],
)
def test_a_bad_row_says_why(row: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        RowEncoder(Letters(), 100)(row)


def test_tokens_that_the_model_does_not_know_are_named() -> None:
    encode = RowEncoder(Letters(), 100, vocabulary=100)
    assert encode({"text": "ab"}).ids == [1, 97, 98, 2]
    with pytest.raises(ValueError, match="has the token id 122; the model knows 100 tokens"):
        encode({"text": "az"})


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_are_read_by_number(tmp_path: Path) -> None:
    texts = ["first", "zweite äöü", "third\nwith a break"]
    rows = Rows(jsonl(tmp_path / "d.jsonl", [{"text": t} for t in texts]), RowEncoder(Letters(), 100))
    assert len(rows) == 3
    assert [written(rows[i].ids)[1:-1] for i in (2, 0, 1)] == [texts[2], texts[0], texts[1]]
    assert list(rows.lengths) == [len(t) + 2 for t in texts]


def test_paragraphs_of_a_text_file_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_text("one\nstill one\n\n\ntwo")
    rows = Rows(path, RowEncoder(Letters(), 100))
    assert [written(rows[i].ids)[1:-1] for i in range(len(rows))] == ["one\nstill one\n", "two"]


def test_a_bad_line_is_named_and_skipped_only_if_asked(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [{"text": "good"}, "{broken\n", "\n", {"text": "fine"}, {"txet": "x"}])
    with pytest.raises(InputError, match=r"d\.jsonl, line 2: is not JSON"):
        Rows(path, RowEncoder(Letters(), 100))
    rows = Rows(path, RowEncoder(Letters(), 100), skip_bad=True)
    assert len(rows) == 2
    assert [line for line, _ in rows.skipped] == [2, 5]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [("d.csv", "a", "must end in"), ("missing.jsonl", None, "no such file"), ("d.jsonl", "\n\n", "no row")],
)
def test_a_file_without_rows_is_refused(tmp_path: Path, name: str, content: str | None, why: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=why):
        Rows(tmp_path / name, RowEncoder(Letters(), 100))


@given(st.integers(1, 200), st.floats(0, 0.9), st.integers(0, 5))
def test_split_is_a_partition(count: int, fraction: float, seed: int) -> None:
    if count == 1:
        fraction = 0.0
    train, held_out = split(count, fraction, seed)
    assert sorted(train + held_out) == list(range(count))
    assert len(train) >= 1
    assert (len(held_out) >= 1) == (fraction > 0)
    assert split(count, fraction, seed) == (train, held_out)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=100))
def test_pack_holds_every_row_once_and_fills_bins(lengths: list[int]) -> None:
    bins = pack(lengths, range(len(lengths)), 64)
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    filled = [sum(lengths[row] for row in rows) for rows in bins]
    assert max(filled) <= 64
    # any two bins hold more than one bin's worth, or best fit would have joined them
    assert all(a + b > 64 for i, a in enumerate(filled) for b in filled[:i])


def test_collator_separates_packed_rows() -> None:
    rows = [Example([5, 6, 7], [5, 6, 7]), Example([8, 9], [IGNORED, 9])]
    batch = Collator(0, packed=True)([rows, [Example([4, 3], [4, 3])]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [4, 3, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9], [-100, 3, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert "attention_mask" not in batch
    alone = Collator(0, packed=False)([rows[:1], [Example([4, 3], [4, 3])]])
    assert alone["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_sequences_read_their_rows_when_asked(tmp_path: Path) -> None:
    rows = Rows(jsonl(tmp_path / "d.jsonl", [{"text": c} for c in "abc"]), RowEncoder(Letters(), 9))
    sequences = Sequences(rows, [[2, 0], [1]])
    assert [[written(e.ids)[1] for e in sequences[i]] for i in range(len(sequences))] == [["c", "a"], ["b"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whether_rows_are_kept_apart_is_seen_through_rounding(dtype: torch.dtype, make_model: Any) -> None:
    from qlora_engine.training.prepare import keeps_packed_rows_apart

    model = make_model("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(5.0)  # attention that matters, as in a trained model
    model.to(dtype)
    assert keeps_packed_rows_apart(model, 300)
    forward = model.forward
    # a mask given by hand switches transformers' own off: the rows are mixed
    model.forward = lambda input_ids, **kwargs: forward(
        input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **kwargs
    )
    assert not keeps_packed_rows_apart(model, 300)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_packed_rows_do_not_see_each_other(name: str, make_model: Any) -> None:
    """The loss of packed rows is that of the rows alone, wherever packing is chosen."""
    from qlora_engine.training.prepare import keeps_packed_rows_apart

    model = make_model(name).eval()
    if not keeps_packed_rows_apart(model, 300):
        pytest.skip(f"{name} takes no separate rows: packing is off there")
    rows = [
        Example(list(range(3, 14)), list(range(3, 14))),
        Example(list(range(40, 47)), list(range(40, 47))),
    ]
    together = Collator(0, packed=True)([rows])
    logits = model(
        input_ids=together["input_ids"], position_ids=together["position_ids"], use_cache=False
    ).logits
    with torch.no_grad():
        alone = torch.cat([model(input_ids=torch.tensor([row.ids])).logits for row in rows], dim=1)
    torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)
