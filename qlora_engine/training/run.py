"""One fine-tuning run: settings in, adapter, logs and a plot out; killed and resumed, the same curve."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from qlora_engine import distributed
from qlora_engine.errors import InputError

from . import graphs, recompute
from .host import activations_to_host, parse_offload
from .interrupt import Interruptible
from .memory import fit, within_window
from .outcome import Outcome, complete, outcome_of, write_outcome
from .packed_rows import attends_by_beginnings
from .prepare import prepare
from .resume import checkpoint_to_go_on_from, is_finished, what_is_trained
from .settings import Settings, precision_of
from .sharding import adapter_weights
from .trainer import AdapterTrainer

# Of the memory that is there: what a step may take for graphs to be captured unasked. Their memory serves
# nothing else: a step of 5.8 GiB reserved 8.4 (8 layers of Llama-3-8B's size, batch 4, an H100).
_ROOM = 0.6
_LOST = {"fp16": 10}  # steps in a row: the gradient scaler finds its way out of some


class _Reporter(TrainerCallback):  # type: ignore[misc]
    """Hands Trainer's logs to a function, and ends a run whose loss or gradients are no numbers."""

    def __init__(self, report: Callable[[dict[str, Any]], None] | None, precision: str) -> None:
        self.report = report
        self.patience = _LOST.get(precision, 1)
        self.lost = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs:
            return
        if self.report is not None and state.is_world_process_zero:
            self.report({"step": state.global_step, "steps": state.max_steps, **logs})
        step = state.global_step
        if not math.isfinite(logs.get("eval_loss", 0.0)):
            raise InputError(f"the validation loss is {logs['eval_loss']} at step {step}: {_why_lost(step)}")
        if "loss" in logs:
            found = [logs["loss"], float(logs.get("grad_norm") or 0.0)]
            self.lost = 0 if all(map(math.isfinite, found)) else self.lost + 1
            if self.lost >= self.patience:
                raise InputError(
                    f"the loss is {found[0]}, the norm of its gradients {found[1]} at step {step}: "
                    f"{_why_lost(step - 1)}"
                )


class _EvaluateLast(TrainerCallback):  # type: ignore[misc]
    """Evaluates after the last step, too, which transformers before 5.4 leaves out between two rounds."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.eval_strategy == "steps" and state.global_step >= state.max_steps:
            control.should_evaluate = True


def _why_lost(trained: int) -> str:
    """What to do about losses that are no numbers, after so many steps."""
    if trained == 0:
        return (
            "nothing was trained before it, so the base holds values that are no numbers, or needs another "
            "--precision; begin anew (--overwrite)"
        )
    return "lower --learning-rate, or use --precision bf16 or fp32, and begin anew (--overwrite)"


def _refuse_no_numbers(model: Any, advice: str) -> None:
    """Refuse an adapter with NaN or infinity in it; all processes must call it.

    Raises:
        InputError: naming the first such parameter.
    """
    trained = [(name, recompute.local(p)) for name, p in model.named_parameters() if p.requires_grad]
    lost = [name for name, part in trained if not bool(part.isfinite().all())]
    if distributed.total(len(lost)):
        where = f" in {lost[0]}" if lost else ""
        raise InputError(f"the adapter holds values that are no numbers{where}: {advice}")


def finetune(
    model: Any,
    tokenizer: Any,
    settings: Settings,
    *,
    resume: bool = False,
    report: Callable[[dict[str, Any]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    show_plan: Callable[[recompute.MemoryPlan], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Outcome:
    """Train the adapters of ``model`` and write them to ``settings.output``.

    Args:
        model: One of our PeftModels around a causal language model, on its device.
        tokenizer: The model's.
        settings: The run.
        resume: Go on from the newest whole checkpoint of ``settings.output``.
        report: Gets each log as a dict.
        progress: Called while the data is read, with bytes read and bytes in all.
        show_plan: Gets the memory plan before training begins.
        say: Gets what the user should know at once. Where it is given, the first SIGINT or SIGTERM of a run
            of one process ends it after the step, with a checkpoint.

    Raises:
        InputError: unusable data or settings, a resumed run whose settings differ, or a loss that became NaN.
        KeyboardInterrupt: the run was interrupted; it can be resumed.
    """
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    precision = precision_of(settings.precision, device)
    set_seed(settings.seed)
    _refuse_no_numbers(model, "it cannot be trained")
    asked, settings = settings, within_window(model, settings)
    train, validation, collator, notes = prepare(model, tokenizer, settings, progress)
    if settings.max_length < asked.max_length:
        notes.append(f"the model has positions for {settings.max_length} tokens: rows are cut there")
    if settings.early_stopping and validation is None:
        raise InputError("early stopping needs validation rows")
    memory = fit(model, settings, collator.packed)
    if collator.packed and memory.loss_function and attends_by_beginnings(recompute.unwrapped(model)):
        sets = [train] if validation is None else [train, validation]
        collator = replace(collator, most=max(len(rows) for data in sets for rows in data.bins))
    if not memory.loss_function:
        notes.append("this model's head does not allow the chunked loss: full logits are computed")
    if show_plan is not None:
        show_plan(memory)
    _make_ready(model, memory.recomputed, on_host="activations" in parse_offload(settings.offload))
    output = settings.output
    checkpoints = output / "checkpoints"
    used = {"precision": precision, "loss": memory.loss_function, "rows": train.rows.checksum}
    used |= what_is_trained(model)
    used |= {} if validation is None else {"validation_rows": validation.rows.checksum}
    against = _why_no_graphs(settings, collator.packed)
    if settings.cuda_graphs == "auto" and memory.total > _ROOM * memory.available:
        against = against or "memory is short"
    graphs.can_replay(model, settings.cuda_graphs, against)
    checkpoint = distributed.from_main(
        lambda: checkpoint_to_go_on_from(checkpoints, settings, used, resume=resume)
    )
    finished = checkpoint is not None and is_finished(checkpoint, settings)
    replayed = None if finished else graphs.enable(model, settings.cuda_graphs, against)
    if replayed is not None:
        collator = replace(collator, length=settings.max_length)  # one shape for all steps
    watch = None if say is None else Interruptible(say)
    callbacks: list[Any] = [_Reporter(report, precision), _EvaluateLast()]
    callbacks += [] if watch is None else [watch]
    if settings.early_stopping:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=settings.early_stopping))
    trainer = AdapterTrainer(
        lora_plus_ratio=settings.lora_plus,
        averaging=replayed is not None,
        model=model,
        args=_arguments(
            settings, checkpoints, model, precision, evaluates=validation is not None, anew=checkpoint is None
        ),
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collator,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    seconds = 0.0
    if checkpoint is not None and finished:
        trainer.restore(checkpoint)  # Trainer would train one step more
    else:
        with nullcontext() if watch is None else watch.watching():
            try:
                result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            finally:
                note = None if replayed is None else replayed.note()
                if replayed is not None:
                    replayed.disable()
        seconds = float(result.metrics["train_runtime"])
        notes += [] if note is None else [note]
    _refuse_no_numbers(model, _why_lost(trainer.state.global_step))
    outcome = outcome_of(trainer, seconds, memory.loss_function or "full", notes)
    is_main = distributed.world().is_main
    weights = adapter_weights(model) if recompute.is_sharded(model) else None
    if settings.sample is not None and (is_main or weights is not None):
        outcome.sample = complete(model, tokenizer, settings.sample)
    if is_main:
        write_outcome(output, model, outcome, memory, weights)
    distributed.barrier()
    return outcome


def _make_ready(model: Any, recomputed: int, *, on_host: bool) -> None:
    """Checkpoint as many layers as planned."""
    recompute.apply(model, recomputed)
    if recomputed:
        recompute.unwrapped(model).enable_input_require_grads()
        if on_host:
            activations_to_host(model)
    if next(model.parameters()).device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of the current device, which is the model's


def _why_no_graphs(settings: Settings, packed: bool) -> str | None:
    if settings.shard:
        return "the layers of a sharded model are put together anew at every step"
    if "activations" in parse_offload(settings.offload):
        return "inputs of layers wait on the host (--offload activations)"
    return None if packed else "rows that are not packed differ in length"


def _arguments(
    settings: Settings, checkpoints: Path, model: Any, precision: str, *, evaluates: bool, anew: bool
) -> TrainingArguments:
    """The settings as Trainer knows them."""
    strategy = {True: "steps", False: "epoch"}
    save_every = settings.evaluate_every if settings.early_stopping else settings.save_every
    device = next(model.parameters()).device
    on_cpu = device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        neftune_noise_alpha=settings.neftune,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        optim=settings.optimizer,
        eval_strategy=strategy[settings.evaluate_every > 0] if evaluates else "no",
        eval_steps=settings.evaluate_every or None,
        eval_on_start=evaluates and anew,  # a resumed run has it in its log
        save_strategy=strategy[save_every > 0],
        save_steps=save_every or 500,
        save_total_limit=settings.keep,
        load_best_model_at_end=bool(settings.early_stopping),
        metric_for_best_model="eval_loss" if settings.early_stopping else None,
        logging_steps=1,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # what is no number must be seen
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=on_cpu,
        report_to=["tensorboard"] if settings.tensorboard else "none",
        remove_unused_columns=False,
        disable_tqdm=True,
        prediction_loss_only=True,
        dataloader_pin_memory=not on_cpu,
        include_num_input_tokens_seen="no",
        # an expert that no token of a batch reached has no gradient
        ddp_find_unused_parameters=any("experts" in name for name, _ in model.named_modules()),
    )
    if device.type == "cuda" and distributed.world().size == 1:
        _keep_to(arguments, device)
    return arguments


def _keep_to(arguments: TrainingArguments, device: torch.device) -> None:
    """Train on the model's GPU alone: Trainer would take cuda:0 and, in DataParallel, every other one."""
    assert arguments.device.type == "cuda"  # chosen by now, with the count of GPUs
    arguments._n_gpu = 1
    arguments._setup_devices = device
    torch.cuda.set_device(device)
