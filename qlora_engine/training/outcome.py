"""What a fine-tuning run leaves behind: the adapter, a log, a plot of the losses, a sample."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_engine import distributed
from qlora_engine.files import sync_folder, write_json

from .recompute import MemoryPlan
from .sharding import save_adapter

LOG_FILE = "training_log.json"


@dataclass
class Outcome:
    """What a run gave.

    Attributes:
        steps: Optimizer steps, earlier sessions' included.
        losses: (step, training loss) as logged.
        evaluations: (step, validation loss, perplexity), the first before any step.
        seconds: Of this session.
        tokens_per_second: Of this session, padding not counted.
        peak_bytes: Largest allocation on each process's GPU, the first one's first; empty on CPUs.
        loss_function: What computed the loss: "liger", "chunked", or "full" logits by the model itself.
        sample: The completion of ``Settings.sample``.
        notes: What the user should know.
    """

    steps: int
    losses: list[tuple[int, float]]
    evaluations: list[tuple[int, float, float]]
    seconds: float
    tokens_per_second: float
    peak_bytes: list[int]
    loss_function: str
    sample: str | None = None
    notes: list[str] = field(default_factory=list)


def outcome_of(trainer: Any, seconds: float, loss_function: str, notes: list[str]) -> Outcome:
    """What a trainer has to tell that has trained for so many seconds."""
    history = trainer.state.log_history
    device = trainer.args.device
    return Outcome(
        steps=trainer.state.global_step,
        losses=[(log["step"], log["loss"]) for log in history if "loss" in log],
        evaluations=[
            (log["step"], log["eval_loss"], math.exp(min(log["eval_loss"], 700.0)))
            for log in history
            if "eval_loss" in log
        ],
        seconds=seconds,
        tokens_per_second=distributed.total(trainer.tokens) / seconds if seconds else 0.0,
        peak_bytes=distributed.gather(torch.cuda.max_memory_allocated(device))
        if device.type == "cuda"
        else [],
        loss_function=loss_function,
        notes=notes,
    )


@torch.no_grad()
def complete(model: Any, tokenizer: Any, prompt: str, tokens: int = 64) -> str:
    """Greedy completion of a prompt."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    ids = tokenizer(prompt, return_tensors="pt").to(device)
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    model.train(training)
    return str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def write_outcome(
    output: Path,
    model: nn.Module,
    outcome: Outcome,
    memory: MemoryPlan,
    weights: dict[str, torch.Tensor] | None,
) -> None:
    """The adapter under a temporary name first, then in place; then logs, a plot; the checkpoints last go."""
    unfinished = output / ".adapter.unfinished"
    if unfinished.is_dir() and not unfinished.is_symlink():
        shutil.rmtree(unfinished)
    else:
        unfinished.unlink(missing_ok=True)
    save_adapter(model, unfinished, weights)
    for path in sorted(unfinished.iterdir()):
        path.replace(output / path.name)
    unfinished.rmdir()
    write_json(output / LOG_FILE, {**asdict(outcome), "memory": memory.to_json()})
    plot_losses(outcome, output / "loss.png")
    sync_folder(output)


def plot_losses(outcome: Outcome, path: Path) -> bool:
    """Training and validation loss by step as a PNG; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    if outcome.losses:
        axes.plot(*zip(*outcome.losses), label="training", linewidth=1)
    if outcome.evaluations:
        axes.plot(
            [e[0] for e in outcome.evaluations], [e[1] for e in outcome.evaluations], "o-", label="validation"
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return True
