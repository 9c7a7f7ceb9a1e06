"""One fine-tuning run: settings in, adapter, logs and a plot out; killed and resumed, the same curve."""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments, set_seed

from qlora_engine import distributed
from qlora_engine.errors import InputError
from qlora_engine.files import read_json_object, sync_folder, write_json

from . import recompute
from .data import Collator, RowEncoder, Rows, Sequences, pack, split
from .host import activations_to_host, embedding_to_host, parse_offload
from .loss import use_chunked_loss
from .optimizers import check_optimizer, state_bytes
from .sharding import adapter_weights, is_sharded, save_adapter
from .trainer import AdapterTrainer, latest_checkpoint

SETTINGS_FILE = "settings.json"
LOG_FILE = "training_log.json"
PRECISIONS = ("auto", "bf16", "fp16", "fp32")


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
        scheduler: transformers' name.
        warmup: Fraction of the steps.
        weight_decay: AdamW's.
        max_grad_norm: Gradients are clipped to it; 0: not.
        max_length: Tokens of a sequence.
        packing: "auto" (where the model keeps packed rows apart), "on", "off".
        train_on: "completion" or "all" tokens.
        neftune: Noise of the embeddings (Jain et al. 2023, arXiv:2310.05914); None: none.
        precision: One of PRECISIONS; "auto": bf16 where the GPU has it, fp16 on older ones, fp32 on a CPU.
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
    precision: str = "auto"
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
        at_least_one = ("batch_size", "accumulate", "keep")
        not_negative = (
            "max_steps",
            "evaluate_every",
            "save_every",
            "early_stopping",
            "warmup",
            "weight_decay",
        )
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}; it must be at least 1")
        for name in not_negative:
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)}; it must not be negative")
        if self.max_length < 2:
            raise InputError(f"max_length={self.max_length}; it must be at least 2")
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate={self.learning_rate}; it must be positive")
        if not 0 <= self.validation_fraction < 1:
            raise InputError(f"validation_fraction={self.validation_fraction}; it must be in [0, 1)")
        choices = {
            "packing": ("auto", "on", "off"),
            "train_on": ("completion", "all"),
            "precision": PRECISIONS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}={getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if parse_offload(self.offload) and self.shard:
            raise InputError("offload is for one GPU or copies (DDP); with --shard leave it out")
        check_optimizer(self.optimizer, sharded=self.shard)
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise InputError(
                "--tensorboard needs tensorboard, which is not installed (pip install tensorboard)"
            )

    def to_json(self) -> dict[str, Any]:
        """JSON-able, for the check that a resumed run is the same run."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


@dataclass
class Outcome:
    """What a run gave.

    Attributes:
        steps: Optimizer steps, earlier sessions' included.
        losses: (step, training loss) as logged.
        evaluations: (step, validation loss, perplexity), the first before any step.
        seconds: Of this session.
        tokens_per_second: Of this session, padding not counted.
        peak_bytes: Largest allocation on the GPU; 0 on a CPU.
        sample: The completion of ``Settings.sample``.
        notes: What the user should know.
    """

    steps: int
    losses: list[tuple[int, float]]
    evaluations: list[tuple[int, float, float]]
    seconds: float
    tokens_per_second: float
    peak_bytes: int
    sample: str | None = None
    notes: list[str] = field(default_factory=list)


def precision_of(wanted: str, device: torch.device) -> str:
    """bf16, fp16 or fp32."""
    if wanted != "auto":
        return wanted
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


@torch.no_grad()
def keeps_packed_rows_apart(model: Any, vocabulary: int) -> bool:
    """Whether positions that restart separate rows: tried on two short rows."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(vocabulary, (1, 12), generator=generator).to(device)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None].to(device)
    training = model.training
    model.eval()
    try:
        packed = model(input_ids=rows, position_ids=positions, use_cache=False).logits[:, 5:]
        alone = model(input_ids=rows[:, 5:], use_cache=False).logits
    except (TypeError, ValueError):  # takes no positions
        return False
    finally:
        model.train(training)
    return bool(torch.allclose(packed.float(), alone.float(), rtol=1e-3, atol=1e-2))


def prepare(
    model: Any, tokenizer: Any, settings: Settings, progress: Callable[[int, int], None] | None = None
) -> tuple[Sequences, Sequences | None, Collator, list[str]]:
    """Data sets and collator of a run, and what there is to say about them.

    Raises:
        InputError: data that cannot be used, or packing asked of a model that would mix the rows.
    """
    notes = []
    encode = RowEncoder(tokenizer, settings.max_length, settings.train_on == "all")
    rows = Rows(settings.data, encode, skip_bad=settings.skip_bad_rows, progress=progress)
    packed = settings.packing != "off" and keeps_packed_rows_apart(model, len(tokenizer))
    if settings.packing == "on" and not packed:
        raise InputError("this model's attention would mix packed rows; use --packing off")
    if rows.n_skipped:
        line, why = rows.skipped[0]
        notes.append(f"{rows.n_skipped} bad rows passed over, the first on line {line}: {why}")
    fraction = 0.0 if settings.validation is not None or len(rows) < 2 else settings.validation_fraction
    train, held_out = split(len(rows), fraction, settings.seed)

    def bins(source: Rows, numbers: list[int]) -> Sequences:
        if packed:
            return Sequences(source, pack(source.lengths, numbers, settings.max_length))
        return Sequences(source, [[number] for number in numbers])

    validation = bins(rows, held_out) if held_out else None
    if settings.validation is not None:
        other = Rows(settings.validation, encode, skip_bad=settings.skip_bad_rows)
        validation = bins(other, list(range(len(other))))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sequences = bins(rows, train)
    if packed:
        notes.append(f"{len(train)} rows packed into {len(sequences)} sequences")
    return sequences, validation, Collator(pad or 0, packed), notes


class _Reporter(TrainerCallback):  # type: ignore[misc]
    """Hands Trainer's logs to a function."""

    def __init__(self, report: Callable[[dict[str, Any]], None]) -> None:
        self.report = report

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            self.report({"step": state.global_step, "steps": state.max_steps, **logs})


def finetune(
    model: Any,
    tokenizer: Any,
    settings: Settings,
    *,
    resume: bool = False,
    report: Callable[[dict[str, Any]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    show_plan: Callable[[recompute.MemoryPlan], None] | None = None,
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

    Raises:
        InputError: unusable data or settings, or a resumed run whose settings differ.
    """
    device = next(model.parameters()).device
    precision = precision_of(settings.precision, device)
    if is_sharded(model) and precision == "fp16":
        raise InputError("--shard cannot train in fp16; use --precision bf16 or fp32")
    offload = parse_offload(settings.offload)
    set_seed(settings.seed)
    train, validation, collator, notes = prepare(model, tokenizer, settings, progress)
    if not use_chunked_loss(model):
        notes.append("this model's head does not allow the chunked loss: full logits are computed")
    if "embedding" in offload:
        embedding_to_host(model)
    memory = memory_plan(model, settings)
    if show_plan is not None:
        show_plan(memory)
    recompute.apply(model, memory.recomputed)
    if memory.recomputed:
        recompute.unwrapped(model).enable_input_require_grads()
        if "activations" in offload:
            activations_to_host(model)
    if device.type == "cuda":
        from qlora_engine import fused_blocks

        fused_blocks.enable(model)
        torch.cuda.reset_peak_memory_stats()
    output = settings.output
    checkpoints = output / "checkpoints"
    checkpoint = distributed.from_main(lambda: _checkpoint(output, checkpoints, settings, resume))
    strategy = {True: "steps", False: "epoch"}
    evaluates = validation is not None
    if settings.early_stopping and not evaluates:
        raise InputError("early stopping needs validation rows")
    save_every = settings.evaluate_every if settings.early_stopping else settings.save_every
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
        eval_on_start=evaluates and checkpoint is None,  # a resumed run has it in its log
        save_strategy=strategy[save_every > 0],
        save_steps=save_every or 500,
        save_total_limit=settings.keep,
        load_best_model_at_end=bool(settings.early_stopping),
        metric_for_best_model="eval_loss" if settings.early_stopping else None,
        logging_steps=1,
        logging_first_step=True,
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=device.type == "cpu",
        report_to=["tensorboard"] if settings.tensorboard else "none",
        remove_unused_columns=False,
        disable_tqdm=True,
        prediction_loss_only=True,
        dataloader_pin_memory=device.type == "cuda",
        include_num_input_tokens_seen="no",
        # an expert that no token of a batch reached has no gradient
        ddp_find_unused_parameters=any("experts" in name for name, _ in model.named_modules()),
    )
    callbacks: list[Any] = [] if report is None else [_Reporter(report)]
    if settings.early_stopping:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=settings.early_stopping))
    trainer = AdapterTrainer(
        lora_plus_ratio=settings.lora_plus,
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collator,
        callbacks=callbacks,
    )
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    outcome = _outcome(trainer, result, notes)
    is_main = distributed.world().is_main
    weights = adapter_weights(model) if is_sharded(model) else None
    if settings.sample is not None and (is_main or weights is not None):
        outcome.sample = complete(model, tokenizer, settings.sample)
    if is_main:
        _write(output, model, outcome, memory, weights)
    distributed.barrier()
    return outcome


def memory_plan(model: Any, settings: Settings) -> recompute.MemoryPlan:
    """The plan of a run with these settings, see ``recompute.plan``."""
    return recompute.plan(
        model,
        batch_size=settings.batch_size,
        length=settings.max_length,
        recompute=settings.recompute,
        available=None if settings.memory_limit is None else int(settings.memory_limit * 2**30),
        optimizer_bytes=state_bytes(settings.optimizer),
        inputs_on_host="activations" in parse_offload(settings.offload),
    )


def when_out_of_memory(settings: Settings) -> str:
    """What to change, the cheapest first."""
    offload = parse_offload(settings.offload)
    ways = [
        (settings.recompute != "full", "--recompute full"),
        ("activations" not in offload and not settings.shard, "--offload activations"),
        ("embedding" not in offload and not settings.shard, "--offload embedding"),
        (state_bytes(settings.optimizer) > 4 and not settings.shard, "--optimizer paged_adamw_8bit"),
        (settings.batch_size > 1, f"--batch-size {max(1, settings.batch_size // 2)} with --accumulate"),
        (True, f"a --max-length below {settings.max_length}"),
        (not settings.shard, "several GPUs: torchrun with --shard"),
    ]
    return ", ".join(text for possible, text in ways if possible)


def _checkpoint(output: Path, checkpoints: Path, settings: Settings, resume: bool) -> Path | None:
    """Where to go on, after a look at whether this is the same run; writes the settings of a new one."""
    stored = checkpoints / SETTINGS_FILE
    now = settings.to_json() | {"processes": distributed.world().size}
    if resume:
        if not stored.is_file():
            raise InputError(f"nothing to resume in {output}: no {stored.name}")
        then = read_json_object(stored)
        changed = [key for key in now if now[key] != then.get(key) and key not in ("sample", "tensorboard")]
        if changed:
            key = changed[0]
            raise InputError(
                f"--resume: {key} was {then.get(key)!r}, is {now[key]!r}; a resumed run must be the same"
            )
        return latest_checkpoint(checkpoints)
    checkpoints.mkdir(parents=True, exist_ok=True)
    write_json(stored, now)
    return None


def _outcome(trainer: Any, result: Any, notes: list[str]) -> Outcome:
    history = trainer.state.log_history
    seconds = float(result.metrics["train_runtime"])
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
        peak_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
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


def _write(
    output: Path,
    model: nn.Module,
    outcome: Outcome,
    memory: recompute.MemoryPlan,
    weights: dict[str, torch.Tensor] | None,
) -> None:
    """The adapter under a temporary name first, then in place; then logs, a plot; the checkpoints last go."""
    unfinished = output / ".adapter.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
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
