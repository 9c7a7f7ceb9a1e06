"""What ``qlora-finetune`` prints: a line a step for people, JSON lines for programs."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from qlora_engine.cli import common


class Display:
    """What the command prints: a line a step on a terminal, JSON lines for machines, nothing if quiet."""

    def __init__(self, *, quiet: bool, as_json: bool) -> None:
        self.as_json = as_json
        self.silent = quiet
        self.console = common.console(sys.stderr, quiet=quiet or as_json)
        self.began = time.monotonic()
        self.before: int | None = None  # steps of earlier sessions

    def say(self, text: str) -> None:
        """A line for people."""
        self.console.print(text, markup=False, soft_wrap=True)

    def _emit(self, kind: str, values: dict[str, Any]) -> None:
        if self.as_json and not self.silent:
            known = {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in values.items()
            }
            print(json.dumps({"kind": kind, **known}), flush=True)  # JSON has no NaN

    def plan(self, plan: Any) -> None:
        """The memory plan; training begins."""
        self.began = time.monotonic()
        self._emit("plan", plan.to_json())
        for line in plan.lines():
            self.console.print(line, markup=False)

    def log(self, log: dict[str, Any]) -> None:
        """A line of Trainer's log."""
        self._emit("log", log)
        step, steps = log["step"], log["steps"]
        if "loss" in log:
            self.before = step - 1 if self.before is None else self.before
            left = (time.monotonic() - self.began) / (step - self.before) * (steps - step)
            self.console.print(
                f"step {step}/{steps}  loss {log['loss']:.4f}  learning rate {log['learning_rate']:.2e}  "
                f"about {left:.0f} s left",
                markup=False,
            )
        elif "eval_loss" in log:
            perplexity = math.exp(min(log["eval_loss"], 700.0))
            self.console.print(
                f"step {step}/{steps}  validation loss {log['eval_loss']:.4f}  perplexity {perplexity:.3f}",
                markup=False,
            )

    def outcome(self, outcome: Any, output: Path, model: str) -> None:
        """What came out, and how to go on."""
        self._emit("outcome", dataclasses.asdict(outcome))
        for note in outcome.notes:
            self.console.print(f"note: {note}", markup=False, soft_wrap=True)
        if outcome.losses:
            first, last = outcome.losses[0][1], outcome.losses[-1][1]
            self.console.print(
                f"{outcome.steps} steps, training loss {first:.4f} -> {last:.4f}, "
                f"{outcome.tokens_per_second:.0f} tokens/s",
                markup=False,
            )
        if outcome.sample is not None:
            self.console.print(f"sample: {outcome.sample}", markup=False, soft_wrap=True)
        if not self.silent:  # other processes may come here before the adapter is written
            merge = shlex.join(["qlora-merge", model, str(output), "MERGED"])
            self.console.print(f"adapter: {output}\nnext: {merge}", markup=False, soft_wrap=True)
