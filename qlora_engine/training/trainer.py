"""transformers' Trainer with adapter checkpoints that a killed run can trust, and LoRA+ learning rates."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput

from qlora_engine.adapter_state import load_peft_weights, set_peft_model_state_dict
from qlora_engine.distributed import barrier, total, world
from qlora_engine.files import sync_file, write_json

from .data import IGNORED
from .gradients import average_gradients, share_parameters
from .output import COMPLETE
from .recompute import is_sharded
from .sharding import (
    adapter_weights,
    load_optimizer_state,
    optimizer_state,
    put_adapter,
    save_adapter,
    whole,
)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in ``folder``; cut-off ones are removed."""
    found: list[tuple[int, Path]] = []
    for path in sorted(folder.glob("checkpoint-*")) if folder.is_dir() else []:
        step = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if step is None or not path.is_dir():
            continue
        if (path / COMPLETE).is_file():
            found.append((int(step[1]), path))
        else:
            shutil.rmtree(path)
    return max(found)[1] if found else None


def _write_error(error: RuntimeError, folder: Path) -> Exception:
    """torch.save reports the disk's errors as RuntimeErrors without a number."""
    if not any(word in str(error) for word in ("iostream", "inline_container", "PytorchStreamWriter")):
        return error
    free = shutil.disk_usage(folder).free
    number = errno.ENOSPC if free < 1 << 20 else errno.EIO
    return OSError(number, os.strerror(number), str(folder))


def remove_old_checkpoints(folder: Path, keep: int, spare: Sequence[str] = ()) -> None:
    """Leave the ``keep`` newest checkpoints of ``folder``, among them those named in ``spare``.

    The mark of a checkpoint goes first: one that is half removed is no checkpoint any more.
    """
    steps = sorted(
        (int(step[1]), path)
        for path in folder.glob("checkpoint-*")
        if (step := re.fullmatch(r"checkpoint-(\d+)", path.name))
    )
    older = [path for _, path in steps[:-1] if path.name not in spare]
    spared = len(steps) - len(older)
    for path in older[: max(len(older) - max(keep - spared, 0), 0)]:
        (path / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(path)


class AdapterTrainer(Trainer):
    """Saves and restores the adapter alone, and marks a checkpoint when all of it is on disk.

    A model that is sharded already is taken as it is: Trainer's libraries would wrap it once more, and know
    no sharding on CPUs. Its checkpoints hold whole tensors, so that they do not depend on the number of
    processes.

    Args:
        lora_plus_ratio: Learning rate of B over that of A (Hayou et al. 2024, arXiv:2402.12354); None: 1.
        averaging: Several processes average gradients behind backward, not in DistributedDataParallel.
        kwargs: Trainer's.
    """

    optimizer: Any

    def __init__(
        self, *, lora_plus_ratio: float | None = None, averaging: bool = False, **kwargs: Any
    ) -> None:
        self.sharded = is_sharded(kwargs["model"])
        super().__init__(**kwargs)
        self.lora_plus_ratio = lora_plus_ratio
        self.tokens = 0  # of this session's forwards, padding of unpacked rows not counted
        self._gathered: dict[str, torch.Tensor] | None = None
        self.averaged: list[nn.Parameter] = []
        accelerator: Any = self.accelerator
        prepare, clip = accelerator.prepare_model, accelerator.clip_grad_norm_

        def prepare_model(model: nn.Module, **options: Any) -> Any:
            return prepare(model, **{**options, "device_placement": False, "evaluation_mode": True})

        if self.sharded:
            accelerator.clip_grad_norm_ = lambda *args, **options: whole(clip(*args, **options))
        elif averaging and world().size > 1:
            self.averaged = [p for p in self.model.parameters() if p.requires_grad]
            share_parameters(self.averaged)
        if self.sharded or self.averaged:
            accelerator.prepare_model = prepare_model

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with the tokens counted and, where asked for, the gradients averaged."""
        mask = inputs.get("attention_mask")
        self.tokens += inputs["input_ids"].numel() if mask is None or mask.is_cuda else int(mask.sum())
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.averaged and self.accelerator.sync_gradients:
            average_gradients(self.averaged)
        return loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's, with B's parameters in a group of their own where LoRA+ is asked for."""
        if self.optimizer is None and self.lora_plus_ratio is not None:
            trained = [(n, p) for n, p in (model or self.model).named_parameters() if p.requires_grad]
            fast = [p for n, p in trained if "lora_B" in n or "lora_embedding_B" in n]
            slow = [p for n, p in trained if not ("lora_B" in n or "lora_embedding_B" in n)]
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            decay = self.args.weight_decay
            groups = [
                {"params": slow, "weight_decay": decay},
                {"params": fast, "weight_decay": decay, "lr": self.args.learning_rate * self.lora_plus_ratio},
            ]
            self.optimizer = kind([group for group in groups if group["params"]], **options)
        # transformers 5.0 takes no argument
        optimizer: torch.optim.Optimizer = super().create_optimizer(*([] if model is None else [model]))
        return optimizer

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """The loss a token over the whole set, whatever its batches and however many processes share them.

        (Trainer's is the mean over batches, in which a short row counts as much as a long one, and it
        repeats rows to give every process as many.)
        """
        data, size = dataloader.dataset, self.args.per_device_eval_batch_size
        here = world()
        model: Any = self.model_wrapped
        model.eval()
        loss, tokens = 0.0, 0
        for first in range(0, len(data), size * here.size):
            start = first + size * here.rank
            mine = range(start, min(start + size, len(data)))
            # a process without rows keeps the others company: a sharded model needs all of them
            rows = [data[i] for i in mine or range(1)]
            inputs = self._prepare_inputs(self.data_collator(rows))
            with self.compute_loss_context_manager():
                mean = model(**inputs).loss
            if mine:
                count = int((inputs["labels"] != IGNORED).sum())
                loss, tokens = loss + float(mean) * count, tokens + count
        loss, tokens = total(loss), int(total(tokens))
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": loss / max(tokens, 1)}, len(data))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            save_adapter(self.model, folder, self._gathered)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # All processes gather here: whether they all get to _save differs between releases of Trainer.
        self._gathered = adapter_weights(self.model) if self.sharded else None
        # Trainer removes old checkpoints last of all; here the new one must have its mark before that.
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        except RuntimeError as error:
            raise _write_error(error, Path(self.args.output_dir)) from error
        finally:
            self.args.save_total_limit, self._gathered = keep, None
        barrier()  # every process has written its random state
        if self.args.should_save:
            folder = Path(self.args.output_dir)
            newest = folder / f"checkpoint-{self.state.global_step}"
            for path in newest.iterdir():
                sync_file(path)
            write_json(newest / COMPLETE, {"step": self.state.global_step})
            if keep:
                best = self.state.best_model_checkpoint
                remove_old_checkpoints(folder, keep, () if best is None else (Path(best).name,))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer, state = self.optimizer, optimizer_state(self.optimizer)
        self.optimizer = _States(lambda: state)
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            self.optimizer = optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str) -> None:
        if not self.sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer = self.optimizer
        self.optimizer = _States(None, lambda state: load_optimizer_state(optimizer, state))
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        finally:
            self.optimizer = optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        weights = load_peft_weights(resume_from_checkpoint, device="cpu")
        if self.sharded:
            put_adapter(self.model, weights)
        else:
            set_peft_model_state_dict(self.model, weights)

    def _load_best_model(self) -> None:
        # by its name: the folder may have been moved since
        best = Path(self.state.best_model_checkpoint).name
        self._load_from_checkpoint(str(Path(self.args.output_dir) / best))

    def restore(self, checkpoint: Path) -> None:
        """Take the state and the adapter of a finished run's last checkpoint, the best one where asked."""
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        else:
            self._load_from_checkpoint(str(checkpoint))


class _States:
    """Stands for an optimizer while Trainer writes or reads its state."""

    def __init__(self, state_dict: Any, load_state_dict: Any = None) -> None:
        self.state_dict, self.load_state_dict = state_dict, load_state_dict
