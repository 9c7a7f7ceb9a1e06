"""Which of transformers' optimizers can be used here, and what they need."""

from __future__ import annotations

import importlib.util

from qlora_engine.errors import InputError, did_you_mean

# name: bytes of state for a trained parameter
PLAIN = {
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "adafactor": 1,  # rows and columns only: far less than a byte
    "sgd": 0,
    "adagrad": 4,
    "rmsprop": 4,
}
BITSANDBYTES = {
    "adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "paged_adamw_8bit": 2,
    "paged_adamw_32bit": 8,
    "lion_8bit": 1,
    "lion_32bit": 4,
    "paged_lion_8bit": 1,
    "paged_lion_32bit": 4,
    "ademamix_8bit": 3,
    "paged_ademamix_8bit": 3,
    "rmsprop_bnb_8bit": 1,
}


def state_bytes(name: str) -> int:
    """Bytes of optimizer state for a trained parameter."""
    return {**PLAIN, **BITSANDBYTES}[name]


def check_optimizer(name: str, *, sharded: bool = False) -> None:
    """Refuse an optimizer that is not known or cannot run here.

    Args:
        name: transformers' name.
        sharded: The parameters are spread over processes.

    Raises:
        InputError: saying what is wrong and what can be used instead.
    """
    known = [*PLAIN, *BITSANDBYTES]
    if name not in known:
        raise InputError(f"optimizer {name!r}{did_you_mean(name, known)}; allowed: {', '.join(known)}")
    if sharded and (name in BITSANDBYTES or name == "adafactor"):
        whose = "bitsandbytes" if name in BITSANDBYTES else "transformers"
        raise InputError(
            f"optimizer {name!r}: {whose} computes it on whole tensors, not on shards; with --shard use "
            "adamw_torch (its 8 bytes a trained parameter are spread over the processes), adagrad or sgd"
        )
    if name in BITSANDBYTES and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"optimizer {name!r} needs bitsandbytes, which is not installed (pip install bitsandbytes); "
            "adamw_torch needs nothing"
        )
