"""Factors of stacked experts in files of PEFT before 0.20, which has them in another order.

For a stack (experts, a, b) PEFT up to 0.18 takes a for the inputs and b for the outputs, whatever the model
multiplies; 0.19 turns that round for stacks (experts, in, out) alone; 0.20 for stacks (experts, out, in)
alone, as it is since, and here. Where a is b the shapes do not show it.
"""

from __future__ import annotations

import re
from typing import Any

from .errors import InputError


def release_of_stacks(config: Any) -> str | None:
    """The release of PEFT that ordered the factors of stacks; None for an adapter that was none on stacks.

    Ask it before the config is used: names of single experts become Parameters then.
    """
    release: str | None = config.peft_version if config.target_parameters else None
    return release


def check_stack(peft_version: str | None, name: str, in_out: bool) -> None:
    """Refuse factors of a stack that lie otherwise than here.

    Args:
        peft_version: See ``release_of_stacks``; None is not refused.
        name: Of the Parameter, for the message.
        in_out: It is (experts, in, out).

    Raises:
        InputError: they were written by PEFT 0.17 to 0.19, and not by 0.17 or 0.18 for (in, out).
    """
    found = re.match(r"(\d+)\.(\d+)", peft_version or "")
    release = (int(found[1]), int(found[2])) if found else (0, 20)
    if release >= (0, 20) or (in_out and release < (0, 19)):
        return
    raise InputError(
        f"the adapter of '{name}' was written by PEFT {peft_version}, which orders the factors of stacked "
        "experts otherwise than PEFT 0.20 and later: merge it with that release, or train it again"
    )


def check_stacks(model: Any, adapter: str, peft_version: str | None) -> None:
    """``check_stack`` for all stacks of a model that ``adapter`` is on."""
    from .lora_param import ParamWrapper

    for module in model.modules():
        if isinstance(module, ParamWrapper) and adapter in module.lora_A and module.num_experts > 1:
            check_stack(peft_version, module.parameter_name, module.stored_in_out)
