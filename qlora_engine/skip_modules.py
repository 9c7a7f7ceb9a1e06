"""Which modules transformers makes 4-bit ones, and how config.json keeps it from the others."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .architecture import Architecture

# Heads that another model class would put on this base; transformers must not expect them in 4 bits.
USUAL_HEADS = ("lm_head", "score", "classifier", "qa_outputs")


def converts_to_4bit(path: str, skip: Sequence[str]) -> bool:
    """Whether transformers makes the module ``path`` a 4-bit one, given ``llm_int8_skip_modules``.

    Source: transformers 5.23, ``quantizers_utils.should_convert_module``.
    """
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return not any(re.match(rf"(?:{key}){boundary}", path) or path.endswith(key) for key in skip)


def skip_modules(architecture: Architecture, quantised: set[str]) -> tuple[str, ...]:
    """Entries for ``llm_int8_skip_modules`` by which exactly the modules in ``quantised`` become 4-bit ones.

    A path is preferred; where it would also catch a quantised module, an anchored regex names it alone.
    """

    def entry(name: str) -> str:
        caught = any(not converts_to_4bit(path, [name]) for path in quantised)
        return f"^{re.escape(name)}$" if caught else name

    candidates = [module.path for module in architecture.modules if module.stock_4bit]
    dense = [path for path in candidates if path not in quantised]
    prefix = f"{architecture.base_prefix}."
    # The base model alone (AutoModel on a language model's folder) has the same modules without the prefix.
    names = [*dense, *(path.removeprefix(prefix) for path in dense if len(prefix) > 1), *USUAL_HEADS]
    return tuple(dict.fromkeys(entry(name) for name in names))
