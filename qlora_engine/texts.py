"""Text to windows of token ids: what calibration runs through the model.

Sources: a file (.txt; .jsonl, .parquet or .arrow with a row a document), a folder of such files as `datasets`
lays them out, any Python iterable of strings, rows or token ids, or a DataLoader of tokenised batches.
A row is {"text": ...}, {"messages": [...]}, {"prompt": ..., "completion": ...} or {"input_ids": ...}.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_engine.errors import InputError

SUFFIXES = (".txt", ".jsonl", ".parquet", ".arrow")
DEFAULT_WINDOW = 1024
_PIECE = 1 << 16  # characters of a .txt tokenised at a time


def why_no_text(text: str) -> str | None:
    """Why no tokenizer takes ``text``: JSON can name half a surrogate pair; None for all other texts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"character {error.start} is half of a surrogate pair, which is no text"
    return None


@dataclass(frozen=True)
class _Document:
    """Token ids of a text; ``separate`` ones are windows of their own and never joined to others."""

    ids: Tensor  # (n,) int64
    separate: bool = False


@dataclass(frozen=True)
class _Reader:
    """How rows become documents; ``where`` in its methods names the row in an error."""

    tokenizer: Any
    text_field: str
    pack: bool

    def stream(self, text: str, where: str) -> _Document:
        """A piece of a running text: no special tokens, nothing between it and the next piece."""
        return _Document(self._encode(text, where, special=False))

    def text(self, text: str, where: str) -> _Document:
        """A document, with the tokenizer's special tokens and an end-of-sequence token behind it."""
        ids = self._encode(text, where, special=True)
        end = self.tokenizer.eos_token_id
        if self.pack and end is not None and ids.numel() and int(ids[-1]) != end:
            ids = torch.cat([ids, ids.new_tensor([end])])
        return _Document(ids)

    def item(self, item: Any, where: str) -> Iterator[_Document]:
        """Documents of one element of an iterable: a string, a row, a batch, token ids, a list of these."""
        if isinstance(item, str):
            yield self.text(item, where)
        elif isinstance(item, Mapping):
            yield from self._row(item, where)
        elif isinstance(item, Tensor) or _is_ids(item):
            yield from _token_rows(item, None, where)
        elif isinstance(item, (list, tuple)) and item and not isinstance(item[0], int):
            # A batch of texts, or what a TensorDataset gives: one tensor in a list.
            if isinstance(item[0], Tensor) and len(item) > 1:
                raise InputError(
                    f"{where}: a tuple of {len(item)} tensors; give a dict with input_ids instead"
                )
            for part in item:
                yield from self.item(part, where)
        else:
            raise InputError(f"{where}: expected a string, a dict or token ids, got {type(item).__name__}")

    def _row(self, row: Mapping[str, Any], where: str) -> Iterator[_Document]:
        if "input_ids" in row:
            yield from _token_rows(row["input_ids"], row.get("attention_mask"), where)
        elif self.text_field in row:
            yield from self._texts(row[self.text_field], where)
        elif "messages" in row:
            yield self._chat(row["messages"], row.get("tools"), where)
        elif "prompt" in row and "completion" in row:
            prompt, completion = row["prompt"], row["completion"]
            if isinstance(prompt, str) and isinstance(completion, str):
                yield self.text(prompt + completion, where)
            elif isinstance(prompt, list) and isinstance(completion, list):
                yield self._chat(prompt + completion, row.get("tools"), where)
            else:
                raise InputError(
                    f"{where}: prompt and completion must both be strings or both lists of messages"
                )
        else:
            raise InputError(
                f"{where}: no {self.text_field}, messages, prompt with completion, or input_ids; "
                f"fields found: {', '.join(map(str, row)) or 'none'}"
            )

    def _texts(self, value: Any, where: str) -> Iterator[_Document]:
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str):
                raise InputError(f"{where}: {self.text_field} must be a string, got {type(text).__name__}")
            yield self.text(text, where)

    def _chat(self, messages: Any, tools: Any, where: str) -> _Document:
        import jinja2

        if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
            raise InputError(f"{where}: messages must be a list of objects with a role and a content")
        self._need_tokenizer(where)
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise InputError(f"{where}: chat messages, but the tokenizer has no chat template")
        try:
            text = self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        except (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
            raise InputError(f"{where}: the chat template refuses these messages: {error}") from error
        return _Document(self._encode(text, where, special=False))

    def _need_tokenizer(self, where: str) -> None:
        if self.tokenizer is None:
            raise InputError(f"{where}: text needs a tokenizer")

    def _encode(self, text: str, where: str, *, special: bool) -> Tensor:
        self._need_tokenizer(where)
        if reason := why_no_text(text):
            raise InputError(f"{where}: {reason}")
        ids = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.long)


def load_texts(
    source: str | Path | Iterable[Any],
    tokenizer: Any = None,
    *,
    window: int | None = None,
    num_windows: int | None = 64,
    seed: int | None = None,
    pack: bool = True,
    text_field: str = "text",
) -> Iterator[Tensor]:
    """Windows of token ids.

    Args:
        source: Path of a .txt, .jsonl, .parquet or .arrow file (the last two need pyarrow), or of a folder
            that holds such files; where some of its files or folders are named train*, only those are read.
            Or an iterable of strings, rows, token ids or tokenised batches (a DataLoader).
        tokenizer: A transformers tokenizer; may be None if everything is already token ids.
        window: Tokens a window; None is the smaller of 1024 and the tokenizer's ``model_max_length``.
        num_windows: At most so many; None takes all. Reading stops with the last one that is needed.
        seed: None takes the first windows; a number draws them at random, for which everything is read.
        pack: Join texts and cut the stream into full windows (what is left over is dropped, unless it is all
            there is). False: a window a document, a .txt being a document a line, cut to ``window``.
        text_field: Field of a row that holds its text.

    Returns:
        Iterator of int64 (n,), n = ``window`` or less. Token ids and batches that come ready-made stay
        windows of their own, cut to ``window``; where ``attention_mask`` is 0 a token is left out, so that
        padding never reaches the model.

    Raises:
        InputError: no such file, a kind of file or row that is not known, a bad row (named by file and line),
            no token at all, or a window beyond what the tokenizer says the model takes.
    """
    longest = getattr(tokenizer, "model_max_length", None) or DEFAULT_WINDOW
    if window is None:
        window = min(DEFAULT_WINDOW, longest)
    if window < 2:
        raise InputError(f"window must be at least 2 tokens, got {window}")
    if tokenizer is not None and window > longest:
        raise InputError(f"window {window} is longer than the {longest} tokens that the tokenizer allows")
    if num_windows is not None and num_windows < 1:
        raise InputError(f"num_windows must be at least 1, got {num_windows}")
    reader = _Reader(tokenizer, text_field, pack)
    if isinstance(source, (str, Path)):
        documents = _from_files(_files(Path(source)), reader)
    elif isinstance(source, Mapping):
        if "input_ids" not in source:
            raise InputError(
                f"a mapping of {', '.join(map(str, source))} is not a text source: choose one entry"
            )
        documents = reader.item(source, "batch")
    else:
        documents = (d for n, item in enumerate(source) for d in reader.item(item, f"item {n}"))
    return _counted(_cut(documents, window, pack), num_windows, seed, source)


def _counted(windows: Iterator[Tensor], count: int | None, seed: int | None, source: Any) -> Iterator[Tensor]:
    chosen = islice(windows, count) if seed is None or count is None else iter(_draw(windows, count, seed))
    found = False
    for window in chosen:
        found = True
        yield window
    if not found:
        raise InputError(
            f"no token in {source if isinstance(source, (str, Path)) else type(source).__name__}"
        )


def _draw(windows: Iterator[Tensor], count: int, seed: int) -> list[Tensor]:
    """``count`` windows at random, in their order (reservoir sampling: holds no more than it returns)."""
    rng = random.Random(seed)
    kept: list[tuple[int, Tensor]] = []
    for n, window in enumerate(windows):
        if n < count:
            kept.append((n, window))
        elif (slot := rng.randrange(n + 1)) < count:
            kept[slot] = (n, window)
    return [window for _, window in sorted(kept, key=lambda pair: pair[0])]


def _cut(documents: Iterable[_Document], window: int, pack: bool) -> Iterator[Tensor]:
    waiting: list[Tensor] = []
    length, cut_any = 0, False
    for document in documents:
        if not document.ids.numel():
            continue
        if document.separate or not pack:
            cut_any = True
            yield document.ids[:window].clone()
            continue
        waiting.append(document.ids)
        length += document.ids.numel()
        if length >= window:
            joined = torch.cat(waiting)
            whole = length // window * window
            for start in range(0, whole, window):
                cut_any = True
                yield joined[start : start + window].clone()
            waiting, length = [joined[whole:]], length - whole
    if length and not cut_any:
        yield torch.cat(waiting)


def _is_ids(item: Any) -> bool:
    return (
        isinstance(item, Sequence) and not isinstance(item, str) and bool(item) and isinstance(item[0], int)
    )


def _token_rows(ids: Any, mask: Any, where: str) -> Iterator[_Document]:
    """Ready-made token ids (n,) or (batch, n), without the tokens that the mask leaves out."""
    rows = _integers(ids, "input_ids", where)
    keep = torch.ones_like(rows) if mask is None else _integers(mask, "attention_mask", where)
    if rows.ndim not in (1, 2) or keep.shape != rows.shape:
        raise InputError(
            f"{where}: input_ids {tuple(rows.shape)} with attention_mask {tuple(keep.shape)}; "
            "expected (tokens,) or (batch, tokens) and the same shape"
        )
    if not rows.numel():
        return
    for row, kept in zip(rows.reshape(-1, rows.shape[-1]), keep.reshape(-1, rows.shape[-1])):
        yield _Document(row[kept != 0], separate=True)


def _integers(values: Any, name: str, where: str) -> Tensor:
    try:
        tensor = values.detach().cpu() if isinstance(values, Tensor) else torch.tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{where}: {name} is not an array of integers: {error}") from error
    if tensor.is_floating_point() or tensor.is_complex():
        if tensor.numel():
            raise InputError(f"{where}: {name} must be integers, got {tensor.dtype}")
        tensor = tensor.long()
    return tensor.long()


def _files(path: Path) -> list[Path]:
    known = ", ".join(SUFFIXES)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise InputError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; known: {known}")
        return [path]
    if not path.is_dir():
        raise InputError(f"no such file or folder of texts: {path}")
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix in SUFFIXES and file.is_file() and not file.name.startswith(".")
    ]
    train = [f for f in found if any(part.startswith("train") for part in f.relative_to(path).parts)]
    if not found:
        raise InputError(f"{path}: no {known} file in this folder")
    return train or found


def _from_files(files: Iterable[Path], reader: _Reader) -> Iterator[_Document]:
    for path in files:
        if path.suffix == ".txt":
            yield from _from_txt(path, reader)
        else:
            rows = _jsonl_rows(path) if path.suffix == ".jsonl" else _arrow_rows(path)
            for where, row in rows:
                if not isinstance(row, dict):
                    raise InputError(f"{where}: expected an object, got {type(row).__name__}")
                yield from reader.item(row, where)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                yield where, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error


def _from_txt(path: Path, reader: _Reader) -> Iterator[_Document]:
    """The file as one running text, tokenised piece by piece; without packing, a document a line."""
    piece: list[str] = []
    size = 0
    for where, line in _lines(path):
        if not reader.pack:
            if line.strip():
                yield reader.text(line.strip(), where)
            continue
        # Cut only in front of a line that is not blank: tokenizers join runs of line ends.
        if size >= _PIECE and line.strip():
            yield reader.stream("".join(piece), where)
            piece, size = [], 0
        piece.append(line)
        size += len(line)
    if size:
        yield reader.stream("".join(piece), str(path))


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    for where, line in _lines(path):
        if line.strip():
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
            except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
                raise InputError(f"{where}: not JSON that can be read: {error}") from error


def _arrow_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(
            f"{path}: reading {path.suffix} needs pyarrow; or save the texts as .jsonl"
        ) from error
    number = 0
    try:
        with path.open("rb") as file:
            batches = (
                pyarrow.parquet.ParquetFile(file).iter_batches(1024)
                if path.suffix == ".parquet"
                else iter(pyarrow.ipc.open_stream(file))
            )
            for batch in batches:
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path}: not a valid {path.suffix} file: {error}") from error
