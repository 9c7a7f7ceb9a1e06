"""The tokenizer that lies beside a model's weights, or a reason why there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import InputError, in_short


def read_tokenizer(folder: str | Path, **options: Any) -> Any:
    """The tokenizer in ``folder``.

    Without its files transformers makes some an empty one of special tokens alone, GPT-2's and Qwen's among
    them (5.23) and Llama's (5.0), to which all text is unknown: that is none.

    Args:
        folder: A model's, or a hub id that is in the cache.
        options: Of transformers' ``AutoTokenizer.from_pretrained``.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    except (
        Exception
    ) as error:  # whatever a tokenizer's or a config's class raises on files that do not suit it
        raise InputError(f"{folder} has no tokenizer to read texts with: {in_short(error)}") from error
    if _is_empty(tokenizer):
        raise InputError(
            f"{folder} has no tokenizer to read texts with: without its files transformers "
            f"{transformers.__version__} makes a {type(tokenizer).__name__} of special tokens alone"
        )
    return tokenizer


def _is_empty(tokenizer: Any) -> bool:
    """Whether there is nothing but special and added tokens, and the mark that stands for a space."""
    if not hasattr(tokenizer, "get_vocab"):
        return False
    special = {*map(str, tokenizer.all_special_tokens), *tokenizer.get_added_vocab(), "▁"}
    return all(token in special for token in tokenizer.get_vocab())
