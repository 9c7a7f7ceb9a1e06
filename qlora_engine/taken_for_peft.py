"""Let isinstance take our PeftModel for PEFT's, where PEFT is loaded.

transformers' Trainer and TRL ask ``isinstance(model, peft.PeftModel)`` to know that only an adapter trains:
so that they save the adapter, accept a quantised base and look for the head in the base model. Python's
isinstance also asks the object for its ``__class__``; there we answer with a class that is ours and derives
from PEFT's as well. ``type(model)`` stays ours, PEFT is not imported for this and not changed.

Where PEFT is not installed, Trainer trains the model all the same, but ``save_model`` writes its whole state;
``model.save_pretrained`` writes the adapter.
"""

from __future__ import annotations

import functools
import sys
from typing import Any


@functools.cache
def _also(ours: Any, theirs: Any) -> Any:
    return type(ours.__name__, (ours, theirs), {"__module__": ours.__module__, "__doc__": ours.__doc__})


def _new(cls: Any) -> Any:
    return cls.__new__(cls)


class TakenForPeft:
    """Mixin for PeftModel: instances of PEFT's PeftModel by what ``__class__`` says."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # type: ignore[override]
        theirs: Any = getattr(sys.modules.get("peft.peft_model"), "PeftModel", None)
        if not isinstance(theirs, type) or issubclass(type(self), theirs):
            return type(self)
        own: Any = type(self)
        return _also(own, theirs)

    @__class__.setter
    def __class__(self, cls: Any) -> None:  # FSDP2 puts a class of its own in front
        object.__dict__["__class__"].__set__(self, cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle compares ``__class__`` with the class that it writes, unless the maker has a name of its own.
        parts: Any = super().__reduce_ex__(max(2, protocol))
        return (_new, *parts[1:])
