"""Rows of a .jsonl or .txt file as training sequences, read when they are needed.

A file is walked once: where each row begins and how many tokens it has are kept (16 bytes a row), its text
is not, so that a file may be larger than memory and a resumed run finds the same rows in the same order.

    {"text": ...}                         every token is trained on
    {"prompt": ..., "completion": ...}    the completion is
    {"messages": [{"role", "content"}]}   what the assistant says is, through the tokenizer's chat template
"""

from __future__ import annotations

import bisect
import json
import os
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from qlora_engine.errors import InputError, in_short
from qlora_engine.files import no_duplicates
from qlora_engine.texts import why_no_text

from .packed_rows import row_beginnings

IGNORED = -100  # a label that cross entropy passes over
SUFFIXES = (".jsonl", ".txt")


@dataclass(frozen=True)
class Example:
    """A row as it is trained on.

    Attributes:
        ids: Token ids.
        labels: Of the same length: the id where it is trained on, else -100.
        left_out: Tokens at the end of the row that were beyond ``max_length``.
    """

    ids: list[int]
    labels: list[int]
    left_out: int = 0


@dataclass(frozen=True)
class RowEncoder:
    """Turns a row into an Example.

    Attributes:
        tokenizer: A transformers tokenizer.
        max_length: Tokens kept of a row; what is longer is cut at the end.
        everything: Train on prompts too.
        vocabulary: Rows of the model's embedding; None: not known.
    """

    tokenizer: Any
    max_length: int
    everything: bool = False
    vocabulary: int | None = None

    def __call__(self, row: Any) -> Example:
        """Encode a parsed row.

        Raises:
            ValueError: the row has none of the known forms, or nothing in it can be trained on.
        """
        if not isinstance(row, dict):
            raise ValueError(f"expected an object, got {type(row).__name__}")
        if "messages" in row:
            ids, labels = self._chat(row["messages"], row.get("tools"))
        elif "prompt" in row and "completion" in row:
            prompt = self._tokens(row["prompt"], "prompt", special=True)
            answer = [*self._tokens(row["completion"], "completion"), *self._end()]
            ids, labels = prompt + answer, [IGNORED] * len(prompt) + answer
        elif "text" in row:
            if row["text"] == "":
                raise ValueError("'text' is empty: it leaves nothing to train on")
            ids = [*self._tokens(row["text"], "text", special=True), *self._end()]
            labels = list(ids)
        else:
            known = "text; prompt and completion; messages"
            raise ValueError(f"has the keys {sorted(map(str, row))[:6]}; needed: {known}")
        if self.everything:
            labels = list(ids)
        length, most = len(ids), self.max_length
        ids, labels = ids[:most], labels[:most]
        if len(ids) < 2 or all(label == IGNORED for label in labels[1:]):
            of = f" of {length}: --max-length is too low" if length > most else ""
            raise ValueError(f"leaves nothing to train on in its first {min(length, most)} tokens{of}")
        if self.vocabulary is not None and max(ids) >= self.vocabulary:
            raise ValueError(f"has the token id {max(ids)}; the model knows {self.vocabulary} tokens")
        return Example(ids, labels, max(0, length - most))

    def _tokens(self, text: Any, field: str, *, special: bool = False) -> list[int]:
        if not isinstance(text, str):
            raise ValueError(f"'{field}' is {type(text).__name__}, not a string")
        if reason := why_no_text(text):
            raise ValueError(f"'{field}': {reason}")
        ids: list[int] = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        return ids[:-1] if special and ids and ids[-1] == end else ids

    def _end(self) -> list[int]:
        end = self.tokenizer.eos_token_id
        return [] if end is None else [end]

    def _chat(self, messages: Any, tools: Any) -> tuple[list[int], list[int]]:
        well_formed = isinstance(messages, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
        if not well_formed or not messages:
            raise ValueError("'messages' must be a list of objects with the strings 'role' and 'content'")
        for message in messages:
            for field in ("role", "content"):
                if reason := why_no_text(message[field]):
                    raise ValueError(f"'{field}': {reason}")
        if self.tokenizer.chat_template is None:
            raise ValueError("'messages' need a tokenizer with a chat template; use prompt and completion")
        ids: list[int] = self._template(messages, tools)
        labels = [IGNORED] * len(ids)
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._template(messages[:i], tools, add_generation_prompt=True) if i else []
            after = self._template(messages[: i + 1], tools)
            if ids[: len(before)] != before or ids[: len(after)] != after:
                raise ValueError(
                    "the chat template changes a turn once others follow; use prompt and completion"
                )
            labels[len(before) : len(after)] = ids[len(before) : len(after)]
        return ids, labels

    def _template(self, messages: Any, tools: Any, **options: Any) -> list[int]:
        options |= {} if tools is None else {"tools": tools}
        try:
            encoded = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
        except Exception as error:  # a template is a program: it raises what it likes
            raise ValueError(f"the chat template refuses these messages: {in_short(error)}") from error
        return list(encoded["input_ids"])


def check_file(path: Path) -> None:
    """Refuse what cannot be read as rows.

    Raises:
        InputError: no such file, or another ending.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: training data must end in {' or '.join(SUFFIXES)}")
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file of rows")
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no ordinary file, and rows are read more than once; copy it into one")
    if not path.is_file():
        why = f", which {path} links to" if path.is_symlink() else ""
        raise InputError(f"no such file: {os.path.realpath(path) if why else path}{why}")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} cannot be read: no permission")


class Rows:
    """The rows of a file by number, encoded when asked for.

    Args:
        path: A .jsonl file, or a .txt file whose paragraphs (separated by empty lines) are rows.
        encode: What makes an Example of a parsed row.
        skip_bad: Pass over rows that cannot be used instead of refusing the file.
        progress: Called with the bytes read and the bytes in all.

    Attributes:
        lengths: Tokens by row.
        skipped: Bad rows that were passed over: (line number, why), the first 20.
        n_skipped: How many there were.
        n_cut: Rows that are longer than the encoder keeps.
        checksum: CRC-32 of the bytes of all rows in use.

    Raises:
        InputError: no such file, another ending, a bad row (its line number is named), or no row at all.
    """

    def __init__(
        self,
        path: Path,
        encode: RowEncoder,
        *,
        skip_bad: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        check_file(path)
        self.path, self.encode = path, encode
        self.lengths = array("q")
        self.skipped: list[tuple[int, str]] = []
        self.n_skipped = self.n_cut = 0
        self.checksum = 0
        self._spans = array("q")  # first byte and length of each row
        size = path.stat().st_size
        for line, start, raw in self._raw_rows():
            try:
                example = encode(self._parse(raw))
            except ValueError as error:
                if not skip_bad:
                    raise InputError(
                        f"{path}, line {line}: {error} (--skip-bad-rows passes over it)"
                    ) from error
                self.n_skipped += 1
                if len(self.skipped) < 20:
                    self.skipped.append((line, str(error)))
                continue
            self._spans.extend((start, len(raw)))
            self.checksum = zlib.crc32(raw, self.checksum)
            self.lengths.append(len(example.ids))
            self.n_cut += example.left_out > 0
            if progress is not None and len(self.lengths) % 200 == 0:
                progress(start + len(raw), size)
        if not self.lengths:
            raise InputError(f"{path} holds no row to train on ({self.n_skipped} bad rows passed over)")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        start, length = self._spans[2 * index], self._spans[2 * index + 1]
        with self.path.open("rb") as file:
            file.seek(start)
            raw = file.read(length)
        return self.encode(self._parse(raw))

    def _parse(self, raw: bytes) -> Any:
        text = raw.decode("utf-8").removeprefix("\ufeff")  # a byte order mark, at the beginning of the file
        if self.path.suffix == ".txt":
            return {"text": text}
        try:
            return json.loads(text, object_pairs_hook=no_duplicates)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"is not JSON: {error}") from error

    def _raw_rows(self) -> Iterator[tuple[int, int, bytes]]:
        """Line number, first byte and bytes of each row."""
        with self.path.open("rb") as file:
            at, paragraph, first_line, first_byte = 0, b"", 0, 0
            for number, line in enumerate(file, 1):
                if self.path.suffix == ".jsonl":
                    if line.strip():
                        yield number, at, line
                elif line.strip():
                    if not paragraph:
                        first_line, first_byte = number, at
                    paragraph += line
                elif paragraph:
                    yield first_line, first_byte, paragraph
                    paragraph = b""
                at += len(line)
            if paragraph:
                yield first_line, first_byte, paragraph


def split(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Row numbers for training and validation, disjoint and both in ascending order; the same for a seed."""
    held_out = round(count * fraction)
    if fraction > 0:
        held_out = min(max(held_out, 1), count - 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


def pack(lengths: Sequence[int], rows: Sequence[int], capacity: int) -> list[list[int]]:
    """Put rows together so that each bin has at most ``capacity`` tokens: best fit, longest rows first.

    Args:
        lengths: Tokens by row number, each at most ``capacity``.
        rows: The row numbers to pack.
        capacity: Of a bin.

    Returns:
        Bins of row numbers; every row is in exactly one.
    """
    room: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    bins: list[list[int]] = []
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        at = bisect.bisect_left(room, (lengths[row], -1))
        if at == len(room):
            bins.append([])
            left, where = capacity, len(bins) - 1
        else:
            left, where = room.pop(at)
        bins[where].append(row)
        bisect.insort(room, (left - lengths[row], where))
    return bins


class Sequences(Dataset[list[Example]]):
    """Bins of rows as a map-style dataset: item i is the Examples of bin i."""

    def __init__(self, rows: Rows, bins: Sequence[Sequence[int]]) -> None:
        self.rows, self.bins = rows, bins

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> list[Example]:
        return [self.rows[row] for row in self.bins[index]]


@dataclass(frozen=True)
class Collator:
    """Bins to tensors (batch, longest): ``input_ids``, ``labels`` and what keeps rows apart.

    Attributes:
        pad_id: Fills the end of shorter bins.
        packed: Rows of a bin lie one behind the other and ``position_ids`` restart at each, which is how
            transformers' attention masks know them apart; otherwise a bin is one row and there is an
            ``attention_mask``. The first token of a row is never predicted.
        length: Tokens that shorter batches are filled up to; None: their longest bin's.
        most: Rows of a bin at most, where the model takes ``row_beginnings``; None: it does not.
    """

    pad_id: int
    packed: bool
    length: int | None = None
    most: int | None = None

    def __call__(self, bins: list[list[Example]]) -> dict[str, Tensor]:
        longest = max(self.length or 0, *(sum(len(row.ids) for row in rows) for rows in bins))
        ids = torch.full((len(bins), longest), self.pad_id)
        labels = torch.full((len(bins), longest), IGNORED)
        positions = torch.zeros_like(ids)
        mask = torch.zeros_like(ids)
        for i, rows in enumerate(bins):
            at = 0
            for row in rows:
                end = at + len(row.ids)
                ids[i, at:end] = torch.tensor(row.ids)
                labels[i, at + 1 : end] = torch.tensor(row.labels[1:])
                positions[i, at:end] = torch.arange(len(row.ids))
                mask[i, at:end] = 1
                at = end
            positions[i, at:] = torch.arange(longest - at)  # the padding is a row of its own
        batch = {"input_ids": ids, "labels": labels}
        if not self.packed:
            return batch | {"attention_mask": mask}
        batch["position_ids"] = positions
        if self.most is not None:  # and the padding's
            batch["row_beginnings"] = row_beginnings(positions, len(bins) * (self.most + 1))
        return batch
