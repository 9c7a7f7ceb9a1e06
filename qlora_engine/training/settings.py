"""What a fine-tuning run is: its settings, checked, and the precision that a device gets."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_engine.errors import InputError
from qlora_engine.texts import why_no_text

from .host import parse_offload
from .loss import LOSSES
from .optimizers import check_optimizer
from .recompute import parse_recompute

PRECISIONS = ("auto", "bf16", "fp16", "fp32")
# those of transformers that need no settings of their own
SCHEDULERS = (
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
)
_AT_LEAST = {
    "batch_size": 1,
    "accumulate": 1,
    "keep": 1,
    "max_length": 2,
    "max_steps": 0,
    "evaluate_every": 0,
    "save_every": 0,
    "early_stopping": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "neftune": 0,
}
_POSITIVE = ("learning_rate", "epochs", "lora_plus", "memory_limit")
_BELOW = 1 << 31  # no sensible value is near; loaders, optimizers and noise compute with what is below
_FASTEST = 1e6  # learning rate: nothing learns near it, and beyond 1e37 the optimizers' float32 overflows
_POLYNOMIAL_ENDS_AT = 1e-7  # transformers' lr_end
_CHOICES = {
    "packing": ("auto", "on", "off"),
    "train_on": ("completion", "all"),
    "loss": LOSSES,
    "precision": PRECISIONS,
    "cuda_graphs": ("auto", "on", "off"),
    "scheduler": SCHEDULERS,
}


@dataclass(frozen=True)
class Settings:
    """What a run is. Two runs with equal settings, model and data give the same losses on one device.

    Attributes:
        data: Training rows, .jsonl or .txt.
        output: Folder of the adapter; checkpoints and logs lie in it.
        validation: Rows to evaluate on; None: ``validation_fraction`` of the training rows.
        validation_fraction: Of the rows of ``data``, held out.
        epochs: Passes over the data, if ``max_steps`` is 0.
        max_steps: Optimizer steps.
        batch_size: Sequences a device and forward.
        accumulate: Forwards a step.
        learning_rate: Peak.
        lora_plus: Learning rate of B over A's; None: equal.
        scheduler: transformers' name, one of SCHEDULERS.
        warmup: Fraction of the steps.
        weight_decay: AdamW's.
        max_grad_norm: Gradients are clipped to it; 0: not.
        max_length: Tokens of a sequence.
        packing: "auto" (where the model keeps packed rows apart), "on", "off".
        train_on: "completion" or "all" tokens.
        neftune: Noise of the embeddings (Jain et al. 2023, arXiv:2310.05914); None: none.
        loss: "auto" (liger-kernel where it can run, else ours), "liger", "chunked" (ours).
        precision: One of PRECISIONS; "auto": bf16 where the GPU has it, fp16 on older ones, fp32 on a CPU.
        cuda_graphs: "auto" (where it can), "on", "off": replay the decoder layers' launches, see ``graphs``.
            The first step of every session runs without: a resumed run is then equal up to rounding.
        optimizer: transformers' name, such as adamw_torch, paged_adamw_8bit (needs bitsandbytes).
        evaluate_every, save_every: Steps; 0: once an epoch.
        early_stopping: Evaluations without a better loss before the run ends; 0: never. Checkpoints are then
            written at every evaluation, whatever ``save_every`` says, and the best one is what comes out.
        keep: Checkpoints kept.
        seed: Of everything random.
        recompute: See ``recompute.plan``.
        offload: What waits on the host, see ``host.parse_offload``; None: nothing.
        shard: Spread the model over the processes (FSDP2) instead of giving each a copy (DDP).
        memory_limit: GiB that a step may take; None: the device's.
        skip_bad_rows: Pass over rows that cannot be used.
        tensorboard: Write event files too.
        sample: Prompt to complete at the end; None: none.
    """

    data: Path
    output: Path
    validation: Path | None = None
    validation_fraction: float = 0.05
    epochs: float = 1.0
    max_steps: int = 0
    batch_size: int = 4
    accumulate: int = 1
    learning_rate: float = 2e-4
    lora_plus: float | None = None
    scheduler: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 1024
    packing: str = "auto"
    train_on: str = "completion"
    neftune: float | None = None
    loss: str = "auto"
    precision: str = "auto"
    cuda_graphs: str = "auto"
    optimizer: str = "adamw_torch"
    evaluate_every: int = 0
    save_every: int = 0
    early_stopping: int = 0
    keep: int = 2
    seed: int = 0
    recompute: str = "auto"
    offload: str | None = None
    shard: bool = False
    memory_limit: float | None = None
    skip_bad_rows: bool = False
    tensorboard: bool = False
    sample: str | None = None

    def __post_init__(self) -> None:
        for name, lowest in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not lowest <= value:
                raise InputError(f"{name}={value}; it must be at least {lowest}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name}={value}; it must be a positive number")
        for name in (*_AT_LEAST, *_POSITIVE):
            value = getattr(self, name)
            if value is not None and value >= _BELOW:
                raise InputError(f"{name}={value}; it must be below {_BELOW}")
        fastest = self.learning_rate * max(1.0, self.lora_plus or 1.0)
        if fastest > _FASTEST:
            raise InputError(
                f"learning_rate={self.learning_rate}, lora_plus={self.lora_plus}: a rate of {fastest:.3g}; "
                f"it must be at most {_FASTEST:.0f}"
            )
        for name in ("validation_fraction", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}; it must be in [0, 1)")
        if not 0 <= self.seed < 1 << 32:
            raise InputError(f"seed={self.seed}; it must be in [0, 2**32)")
        if self.sample is not None and not self.sample.strip():
            raise InputError("sample is empty; give a prompt")
        if self.sample is not None and (reason := why_no_text(self.sample)):
            raise InputError(f"sample: {reason}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}={getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if self.scheduler == "polynomial" and self.learning_rate <= _POLYNOMIAL_ENDS_AT:
            raise InputError(
                f"learning_rate={self.learning_rate} with scheduler='polynomial'; it must be above "
                f"{_POLYNOMIAL_ENDS_AT}, where that ends"
            )
        parse_offload(self.offload)
        parse_recompute(self.recompute)
        check_optimizer(self.optimizer, sharded=self.shard)
        if self.shard and not can_shard():
            raise InputError(
                f"--shard needs torch 2.12 or newer, this is {torch.__version__}: before, FSDP2 takes no "
                "packed weights; leave --shard out (a copy of the model on each GPU)"
            )
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise InputError(
                "--tensorboard needs tensorboard, which is not installed (pip install tensorboard)"
            )

    def to_json(self) -> dict[str, Any]:
        """JSON-able, for the check that a resumed run is the same run."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


def can_shard() -> bool:
    """Whether torch's FSDP2 takes packed weights.

    Before 2.12 it lets each shard train before it asks whether it should, which whole numbers cannot
    (pytorch/pytorch#177844); 2.6 also wants one dtype for all weights of a layer.
    """
    return torch.__version__ >= "2.12"  # compared as releases: a TorchVersion


def precision_of(wanted: str, device: torch.device) -> str:
    """bf16, fp16 or fp32.

    Raises:
        InputError: fp16 on a CPU.
    """
    if wanted == "fp16" and device.type == "cpu":
        raise InputError("precision='fp16' needs a GPU; on a CPU use fp32 or bf16")
    if wanted != "auto":
        return wanted
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
