"""From a run's settings to its data sets: what is trained on, what is held out, what is packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qlora_engine.errors import InputError

from .data import Collator, RowEncoder, Rows, Sequences, pack, split
from .packed_rows import apart
from .recompute import unwrapped
from .settings import Settings


@torch.no_grad()
def keeps_packed_rows_apart(model: Any, vocabulary: int) -> bool:
    """Whether positions that restart separate rows: tried on two, against what mixing them does."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(vocabulary, (1, 12), generator=generator).to(device)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None].to(device)
    training = model.training
    model.eval()
    try:
        packed = model(input_ids=rows, position_ids=positions, use_cache=False).logits[:, 5:]
        alone = model(input_ids=rows[:, 5:], use_cache=False).logits
        mixed = model(input_ids=rows, use_cache=False).logits[:, 5:]
    except (TypeError, ValueError):  # takes no positions
        return False
    finally:
        model.train(training)
    return apart(packed, alone, mixed)


def _about(rows: Rows) -> list[str]:
    """What is not trained on of a file."""
    notes = []
    if rows.n_skipped:
        line, why = rows.skipped[0]
        notes.append(f"{rows.path}: {rows.n_skipped} bad rows passed over, the first on line {line}: {why}")
    if rows.n_cut:
        most = rows.encode.max_length
        notes.append(
            f"{rows.path}: {rows.n_cut} of {len(rows)} rows are longer than {most} tokens, cut there"
        )
    return notes


def prepare(
    model: Any, tokenizer: Any, settings: Settings, progress: Callable[[int, int], None] | None = None
) -> tuple[Sequences, Sequences | None, Collator, list[str]]:
    """Data sets and collator of a run, and what there is to say about them.

    Raises:
        InputError: data that cannot be used, or packing asked of a model that would mix the rows.
    """
    notes = []
    embedding = unwrapped(model).get_input_embeddings()
    encode = RowEncoder(
        tokenizer,
        settings.max_length,
        settings.train_on == "all",
        getattr(embedding, "num_embeddings", None),
    )
    if tokenizer.eos_token_id is None:
        notes.append("the tokenizer has no token that ends a text: rows are not ended")
    rows = Rows(settings.data, encode, skip_bad=settings.skip_bad_rows, progress=progress)
    packed = settings.packing != "off" and keeps_packed_rows_apart(
        model, min(len(tokenizer), encode.vocabulary or len(tokenizer))
    )
    if settings.packing == "on" and not packed:
        raise InputError("this model's attention would mix packed rows; use --packing off")
    notes += _about(rows)
    fraction = 0.0 if settings.validation is not None or len(rows) < 2 else settings.validation_fraction
    train, held_out = split(len(rows), fraction, settings.seed)

    def bins(source: Rows, numbers: list[int]) -> Sequences:
        if packed:
            return Sequences(source, pack(source.lengths, numbers, settings.max_length))
        return Sequences(source, [[number] for number in numbers])

    validation = bins(rows, held_out) if held_out else None
    if settings.validation is not None:
        other = Rows(settings.validation, encode, skip_bad=settings.skip_bad_rows)
        notes += _about(other)
        validation = bins(other, list(range(len(other))))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sequences = bins(rows, train)
    if packed:
        notes.append(f"{len(train)} rows packed into {len(sequences)} sequences")
    return sequences, validation, Collator(pad or 0, packed), notes
