from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from qlora_engine.errors import InputError
from qlora_engine.texts import load_texts

LINES = [f"{n * n} of a text, {'word ' * (n % 7)}end of {n}." for n in range(400)]


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Callable[[], Any]) -> Any:
    return make_tokenizer()


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_txt_is_one_stream_cut_into_full_windows(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(LINES))
    windows = list(load_texts(path, tokenizer, window=50, num_windows=None))
    assert {tuple(w.shape) for w in windows} == {(50,)}
    assert windows[0].dtype == torch.long
    ids = tokenizer("\n".join(LINES), add_special_tokens=False)["input_ids"]
    assert torch.cat(windows).tolist() == ids[: len(ids) // 50 * 50]


def test_txt_in_pieces_loses_nothing(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n\n".join(LINES)
    path = tmp_path / "a.txt"
    path.write_text(text)
    monkeypatch.setattr("qlora_engine.texts._PIECE", 300)
    windows = list(load_texts(path, tokenizer, window=32, num_windows=None))
    assert text.startswith(tokenizer.decode(torch.cat(windows)))


def test_num_windows_stops_reading(tokenizer: Any) -> None:
    read = 0

    def endless() -> Any:
        nonlocal read
        while True:
            read += 1
            yield "some words that go on"

    assert len(list(load_texts(endless(), tokenizer, window=16, num_windows=3))) == 3
    assert read < 20


def test_seed_draws_the_same_windows_again(tokenizer: Any) -> None:
    def draw(seed: int | None) -> list[list[int]]:
        return [w.tolist() for w in load_texts(LINES, tokenizer, window=60, num_windows=10, seed=seed)]

    every = [w.tolist() for w in load_texts(LINES, tokenizer, window=60, num_windows=None)]
    assert draw(None) == every[:10]
    assert draw(1) == draw(1) != draw(2)
    assert draw(1) != every[:10]
    positions = [every.index(w) for w in draw(1)]
    assert positions == sorted(positions)
    assert len(draw(1)) == 10


def test_documents_are_separated_by_the_end_token(tokenizer: Any) -> None:
    (window,) = load_texts(["one text", "two texts"], tokenizer, num_windows=None)
    one, two = (tokenizer(t)["input_ids"] for t in ("one text", "two texts"))
    assert window.tolist() == [*one, tokenizer.eos_token_id, *two, tokenizer.eos_token_id]


def test_short_remainder_is_dropped_only_if_something_else_is_there(tokenizer: Any) -> None:
    assert 2 < len(next(load_texts(["word " * 30], tokenizer, window=1000))) < 1000
    assert [len(w) for w in load_texts(["word " * 30], tokenizer, window=16)][-1] == 16


def test_pack_false_is_a_window_a_document(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one line\n\n  a second, longer line of words\n")
    windows = list(load_texts(path, tokenizer, window=9, pack=False))
    assert tokenizer.decode(windows[0]) == "one line"
    assert len(windows) == 2
    assert len(windows[1]) == 9


def test_jsonl_rows(tmp_path: Path, tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    rows = [
        {"text": "plain text"},
        {"messages": chat},
        {"prompt": "question ", "completion": "answer"},
        {"prompt": chat[:1], "completion": chat[1:]},
        {"input_ids": [5, 6, 7]},
        {"text": ""},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    windows = [
        tokenizer.decode(w, skip_special_tokens=False) for w in load_texts(path, tokenizer, pack=False)
    ]
    expected = tokenizer.apply_chat_template(chat, tokenize=False)
    assert windows == ["plain text", expected, "question answer", expected, tokenizer.decode([5, 6, 7])]


def test_text_field(tokenizer: Any) -> None:
    rows = [{"content": "some text", "messages": "not looked at"}]
    (window,) = load_texts(rows, tokenizer, text_field="content", pack=False)
    assert tokenizer.decode(window) == "some text"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", r":3: not JSON"),
        ('["a"]', r":3: expected an object, got list"),
        ('{"question": "x", "answer": "y"}', r":3: no text.*found: question, answer"),
        ('{"text": 5}', r":3: text must be a string, got int"),
        ('{"text": null}', r":3: text must be a string, got NoneType"),
        ('{"messages": "hello"}', r":3: messages must be a list"),
        ('{"messages": [{"content": "x"}]}', r":3: messages must be a list of objects with a role"),
        ('{"prompt": "x", "completion": ["y"]}', r":3: prompt and completion must both"),
        ('{"input_ids": [0.5]}', r":3: input_ids must be integers"),
        ('{"input_ids": ["a"]}', r":3: input_ids is not an array of integers"),
        ('{"input_ids": [1, 2], "attention_mask": [1]}', r":3: input_ids \(2,\) with attention_mask \(1,\)"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, tokenizer: Any, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        list(load_texts(path, tokenizer, num_windows=None))


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(InputError, match=r"bad.txt:2: not UTF-8"):
        list(load_texts(path, tokenizer))


def test_template_that_refuses(tokenizer: Any, make_tokenizer: Callable[[], Any]) -> None:
    strict, plain = make_tokenizer(), make_tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    plain.chat_template = None
    row = {"messages": [{"role": "user", "content": "x"}]}
    with pytest.raises(InputError, match=r"item 0: the chat template refuses.*roles must alternate"):
        list(load_texts([row], strict))
    with pytest.raises(InputError, match="no chat template"):
        list(load_texts([row], plain))


def test_folder_prefers_its_training_files(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "test.jsonl", [{"text": "from test"}])
    (tmp_path / "notes.md").write_text("not read")
    assert [tokenizer.decode(w) for w in load_texts(tmp_path, tokenizer, pack=False)] == ["from test"]
    (tmp_path / "train").mkdir()
    write_jsonl(tmp_path / "train" / "0.jsonl", [{"text": "from train"}])
    (tmp_path / "train" / "1.txt").write_text("and more\n")
    windows = [tokenizer.decode(w) for w in load_texts(tmp_path, tokenizer, pack=False)]
    assert windows == ["from train", "and more"]


def test_parquet_and_arrow(tmp_path: Path, tokenizer: Any) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["first", "second"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with (
        pyarrow.OSFile(str(tmp_path / "b.arrow"), "wb") as file,
        pyarrow.ipc.new_stream(file, table.schema) as writer,
    ):
        writer.write_table(table)
    for name in ("a.parquet", "b.arrow"):
        windows = [tokenizer.decode(w) for w in load_texts(tmp_path / name, tokenizer, pack=False)]
        assert windows == ["first", "second"]
    parquet.write_table(pyarrow.table({"title": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(InputError, match=r"c.parquet row 1: no text"):
        list(load_texts(tmp_path / "c.parquet", tokenizer))
    (tmp_path / "d.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match=r"d.parquet: not a valid .parquet"):
        list(load_texts(tmp_path / "d.parquet", tokenizer))


def test_paths_that_cannot_be_read(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(InputError, match=r"cannot read .csv; known: .txt, .jsonl"):
        load_texts(tmp_path / "a.csv", tokenizer)
    with pytest.raises(InputError, match="no such file or folder"):
        load_texts(tmp_path / "nowhere.txt", tokenizer)
    with pytest.raises(InputError, match=r"no \.txt, \.jsonl"):
        load_texts(tmp_path, tokenizer)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match=r"no token in .*empty.txt"):
        list(load_texts(tmp_path / "empty.txt", tokenizer))


@pytest.mark.parametrize("side", ["left", "right"])
def test_dataloader_batches_lose_their_padding(side: str) -> None:
    rows = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    ids, mask = torch.zeros(3, 4, dtype=torch.long), torch.zeros(3, 4, dtype=torch.long)
    for n, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(4 - len(row), 4)
        ids[n, where], mask[n, where] = torch.tensor(row), 1
    batches = DataLoader(
        [{"input_ids": i, "attention_mask": m, "labels": i} for i, m in zip(ids, mask)], batch_size=2
    )
    assert [w.tolist() for w in load_texts(batches, None)] == rows
    assert [w.tolist() for w in load_texts({"input_ids": ids, "attention_mask": mask})] == rows


def test_iterables_of_many_kinds(tokenizer: Any) -> None:
    ids = torch.arange(3, 9).reshape(2, 3)
    assert [w.tolist() for w in load_texts([ids, [7, 8], torch.tensor([9])])] == [
        [3, 4, 5],
        [6, 7, 8],
        [7, 8],
        [9],
    ]
    assert [w.tolist() for w in load_texts(DataLoader(TensorDataset(ids)))] == [[3, 4, 5], [6, 7, 8]]
    assert [w.tolist() for w in load_texts([ids], window=2)] == [[3, 4], [6, 7]]
    texts = DataLoader([{"text": "one"}, {"text": "two"}], batch_size=2)
    assert [tokenizer.decode(w) for w in load_texts(texts, tokenizer, pack=False)] == ["one", "two"]
    strings: Any = DataLoader(["one", "two"], batch_size=2)
    assert [tokenizer.decode(w) for w in load_texts(strings, tokenizer, pack=False)] == ["one", "two"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([3.5], "item 0: expected a string, a dict or token ids, got float"),
        ([(torch.zeros(1, 2), torch.zeros(1, 2))], "item 0: a tuple of 2 tensors"),
        ({"train": ["x"]}, "a mapping of train is not a text source"),
        (["text"], "item 0: text needs a tokenizer"),
        ([], "no token in list"),
        ([{"input_ids": torch.zeros(1, 2, 3).long()}], r"item 0: input_ids \(1, 2, 3\)"),
    ],
)
def test_iterables_that_cannot_be_read(source: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(load_texts(source))


def test_window_bounds(make_tokenizer: Callable[[], Any]) -> None:
    short = make_tokenizer()
    short.model_max_length = 20
    assert [len(w) for w in load_texts(["word " * 200], short, num_windows=2)] == [20, 20]
    with pytest.raises(InputError, match="window 21 is longer than the 20"):
        load_texts(["x"], short, window=21)
    with pytest.raises(InputError, match="at least 2"):
        load_texts(["x"], short, window=1)
    with pytest.raises(InputError, match="num_windows must be at least 1"):
        load_texts(["x"], short, num_windows=0)
