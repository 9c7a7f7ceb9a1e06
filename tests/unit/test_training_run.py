"""A run from Python: early stopping, NEFTune, event files, offload, memory advice, generation after it."""

from __future__ import annotations

import copy
import importlib.util
import json
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_engine import LoftQConfig, LoraConfig, get_peft_model
from qlora_engine.errors import InputError
from qlora_engine.training.run import finetune
from qlora_engine.training.settings import Settings
from qlora_engine.training.trainer import AdapterTrainer, latest_checkpoint


@pytest.fixture
def model(make_model: Any) -> Any:
    config = LoraConfig(
        r=4,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights="loftq",
        loftq_config=LoftQConfig(loftq_bits=4),
    )
    return get_peft_model(make_model("llama"), config)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i} and one is", "completion": f" {i + 1}."} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def settings(data: Path, **changes: Any) -> Settings:
    values: dict[str, Any] = {
        "data": data,
        "output": data.parent / "out",
        "max_steps": 3,
        "batch_size": 2,
        "max_length": 48,
        "learning_rate": 0.01,
    }
    return Settings(**{**values, **changes})


def test_early_stopping_ends_and_keeps_the_best(model: Any, data: Path, make_tokenizer: Any) -> None:
    fresh = copy.deepcopy(model)
    bad = {"learning_rate": 3.0, "scheduler": "constant"}
    chosen = settings(data, max_steps=30, evaluate_every=1, early_stopping=2, keep=2, **bad)
    outcome = finetune(model, make_tokenizer(), chosen)
    assert outcome.steps < 30
    assert outcome.evaluations[0][0] == 0  # before any step
    losses = [loss for _, loss, _ in outcome.evaluations[1:]]
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 2
    folder = data.parent / "out"
    kept = folder / "checkpoints" / f"checkpoint-{best + 1}" / "adapter_model.safetensors"
    assert (folder / "adapter_model.safetensors").read_bytes() == kept.read_bytes()
    # resumed it does not go on, wherever it lies now
    moved = folder.rename(data.parent / "moved")
    (moved / "adapter_model.safetensors").unlink()
    again = settings(data, max_steps=30, evaluate_every=1, early_stopping=2, keep=2, output=moved, **bad)
    assert finetune(fresh, make_tokenizer(), again, resume=True).losses == outcome.losses
    kept = moved / "checkpoints" / kept.parent.name / kept.name
    assert (moved / "adapter_model.safetensors").read_bytes() == kept.read_bytes()
    with pytest.raises(InputError, match="early stopping needs validation rows"):
        finetune(model, make_tokenizer(), settings(data, early_stopping=2, validation_fraction=0.0))


def test_neftune_adds_bounded_noise_in_training_alone(model: Any, data: Path, make_tokenizer: Any) -> None:
    seen: dict[bool, list[tuple[torch.Tensor, torch.Tensor]]] = {True: [], False: []}
    embedding = model.get_base_model().get_input_embeddings()

    inner = model.get_base_model().model
    original = inner.layers[0].forward

    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen[inner.layers[0].training].append((hidden.detach(), ids[-1]))
        return original(hidden, *args, **kwargs)

    ids: list[torch.Tensor] = []
    embedding.register_forward_pre_hook(lambda _, args: ids.append(args[0]))
    inner.layers[0].forward = forward
    alpha = 5.0
    finetune(model, make_tokenizer(), settings(data, neftune=alpha, evaluate_every=3))
    assert seen[True]
    assert seen[False]
    noisy = 0
    for training, calls in seen.items():
        for hidden, tokens in calls:
            noise = hidden - embedding.weight[tokens]
            bound = alpha / (tokens.shape[1] * hidden.shape[-1]) ** 0.5
            assert noise.abs().max() <= bound * (1 + 1e-5)
            noisy += bool(training and noise.abs().max() > bound / 2)
            assert training or not noise.any()
    assert noisy >= 3  # the three steps; the probes before them are without noise


def test_offload_gives_the_same_losses(model: Any, data: Path, make_tokenizer: Any) -> None:
    other = copy.deepcopy(model)
    plain = finetune(model, make_tokenizer(), settings(data, recompute="1"))
    out = data.parent / "offloaded"
    chosen = settings(data, recompute="1", offload="embedding,activations", output=out)
    assert finetune(other, make_tokenizer(), chosen).losses == plain.losses


def test_event_files_are_written_through_tensorboard(
    model: Any, data: Path, make_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer's own callback gets every loss; the package itself is played by a list."""
    import transformers.integrations.integration_utils as integrations

    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def add_text(self, *args: Any) -> None: ...

        def flush(self) -> None: ...

        def close(self) -> None: ...

    played = types.ModuleType("torch.utils.tensorboard")
    played.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", played)
    monkeypatch.setattr(integrations, "is_tensorboard_available", lambda: True)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: n if n == "tensorboard" else found(n))
    outcome = finetune(model, make_tokenizer(), settings(data, tensorboard=True))
    losses = [(step, value) for name, value, step in written if name == "train/loss"]
    assert losses == outcome.losses


def test_cached_generation_is_that_without_a_cache(model: Any, data: Path, make_tokenizer: Any) -> None:
    """``generate`` through quantised layers with adapters: cached, uncached and merged give equal tokens."""
    finetune(model, make_tokenizer(), settings(data, learning_rate=0.05))
    model.eval()
    ids = torch.tensor([[5, 17, 250, 9], [8, 30, 31, 32]])
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    options["eos_token_id"] = None
    mask = torch.ones_like(ids)
    cached = model.generate(input_ids=ids, attention_mask=mask, use_cache=True, **options)
    assert cached.shape == (2, 16)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options), cached)
    padded = torch.tensor([[0, 0, 5, 17, 250, 9]])  # left padding, as batches of prompts have it
    alone = model.generate(
        input_ids=padded, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1]]), use_cache=True, **options
    )
    assert torch.equal(alone[0, 2:], cached[0])
    merged = model.merge_and_unload()
    assert torch.equal(merged.generate(input_ids=ids, attention_mask=mask, **options), cached)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_to_the_same_curve(
    number: signal.Signals, model: Any, data: Path, make_tokenizer: Any
) -> None:
    fresh, other = copy.deepcopy(model), copy.deepcopy(model)
    options = {"max_steps": 6, "evaluate_every": 4}
    whole = finetune(model, make_tokenizer(), settings(data, **options))
    said: list[str] = []

    def report(log: dict[str, Any]) -> None:
        if "loss" in log and log["step"] == 3:
            signal.raise_signal(number)

    out = data.parent / "cut"
    chosen = settings(data, output=out, **options)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        finetune(fresh, make_tokenizer(), chosen, report=report, say=said.append)
    assert signal.getsignal(number) is before
    assert said == ["stopping after this step, with a checkpoint; once more: at once"]
    steps = [path.name for path in (out / "checkpoints").glob("checkpoint-*")]
    assert steps == ["checkpoint-4"]  # the log of a step is written after it
    assert not (out / "adapter_config.json").exists()
    went_on = finetune(other, make_tokenizer(), chosen, resume=True)
    assert went_on.losses == whole.losses
    assert [step for step, *_ in whole.evaluations] == [0, 4, 6]


def test_a_second_signal_ends_at_once(model: Any, data: Path, make_tokenizer: Any) -> None:
    def report(log: dict[str, Any]) -> None:
        if "loss" in log:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        finetune(model, make_tokenizer(), settings(data), report=report, say=lambda text: None)
    assert not list((data.parent / "out" / "checkpoints").glob("checkpoint-*"))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_no_number_ends_the_run(where: str, model: Any, data: Path, make_tokenizer: Any) -> None:
    trained = next(p for p in model.parameters() if p.requires_grad)
    steps = [0]

    def report(log: dict[str, Any]) -> None:
        steps[0] = log["step"]

    def poison(value: torch.Tensor) -> torch.Tensor:
        return value * float("nan") if steps[0] == 2 else value

    if where == "loss":
        norm = model.get_base_model().model.norm
        norm.register_forward_hook(lambda *a: poison(a[2]) if a[2].requires_grad else None)
    else:
        trained.register_hook(poison)
    chosen = settings(data, max_steps=6, save_every=1)
    with pytest.raises(InputError, match=r"the norm of its gradients nan at step 3: lower --learning-rate"):
        finetune(model, make_tokenizer(), chosen, report=report)
    # nothing that is no number was kept
    newest = latest_checkpoint(data.parent / "out" / "checkpoints")
    assert newest is not None
    assert newest.name == "checkpoint-2"
    assert all(t.isfinite().all() for t in load_file(newest / "adapter_model.safetensors").values())


def test_a_resumed_run_must_see_the_same_rows(model: Any, data: Path, make_tokenizer: Any) -> None:
    fresh, other = copy.deepcopy(model), copy.deepcopy(model)
    outcome = finetune(model, make_tokenizer(), settings(data))
    moved = data.rename(data.parent / "moved.jsonl")
    weights = (data.parent / "out" / "adapter_model.safetensors").read_bytes()
    (data.parent / "out" / "adapter_model.safetensors").unlink()
    again = finetune(fresh, make_tokenizer(), settings(moved, keep=1), resume=True)
    assert again.losses == outcome.losses  # a finished run is no step longer
    assert (data.parent / "out" / "adapter_model.safetensors").read_bytes() == weights
    moved.write_text(moved.read_text().replace("8 and one", "8 and two"))
    with pytest.raises(InputError, match=r"--resume: rows was \d+, is \d+"):
        finetune(other, make_tokenizer(), settings(moved), resume=True)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0; it must be a positive number"),
        ({"learning_rate": float("inf")}, "must be a positive number"),
        ({"epochs": float("nan")}, "epochs=nan; it must be a positive number"),
        ({"lora_plus": -1.0}, "must be a positive number"),
        ({"warmup": 1.0}, r"warmup=1.0; it must be in \[0, 1\)"),
        ({"validation_fraction": float("nan")}, r"must be in \[0, 1\)"),
        ({"max_grad_norm": -1.0}, "it must be at least 0"),
        ({"neftune": float("nan")}, "it must be at least 0"),
        ({"max_length": 1}, "max_length=1; it must be at least 2"),
        ({"scheduler": "cosin"}, "scheduler='cosin'; allowed: cosine, linear"),
        ({"recompute": "some"}, "recompute='some'; allowed: auto, none, full, or a count"),
        ({"recompute": "-1"}, "allowed: auto, none, full"),
        ({"memory_limit": 0.0}, "must be a positive number"),
        ({"loss": "fused"}, "loss='fused'; allowed: auto, liger, chunked"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], why: str, data: Path) -> None:
    with pytest.raises(InputError, match=why):
        settings(data, **changes)


def test_the_log_says_what_computed_the_loss(model: Any, data: Path, make_tokenizer: Any) -> None:
    outcome = finetune(model, make_tokenizer(), settings(data, max_steps=1))
    log = json.loads((data.parent / "out" / "training_log.json").read_text())
    assert outcome.loss_function == log["loss_function"] == log["memory"]["loss_function"] == "chunked"
    with pytest.raises(InputError, match="loss='liger': liger-kernel needs a GPU"):
        finetune(model, make_tokenizer(), settings(data, loss="liger"))


def test_fp16_needs_a_gpu(model: Any, data: Path, make_tokenizer: Any) -> None:
    with pytest.raises(InputError, match="precision='fp16' needs a GPU; on a CPU use fp32 or bf16"):
        finetune(model, make_tokenizer(), settings(data, precision="fp16"))


def test_rows_are_cut_at_the_models_window(model: Any, data: Path, make_tokenizer: Any) -> None:
    long = data.parent / "long.jsonl"
    long.write_text(json.dumps({"text": "many words " * 200}) + "\n" + data.read_text())
    outcome = finetune(model, make_tokenizer(), settings(long, max_steps=1, max_length=4096, packing="off"))
    assert "the model has positions for 128 tokens: rows are cut there" in outcome.notes


def test_a_tokenizer_without_an_end_is_told(model: Any, data: Path, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = None
    outcome = finetune(model, tokenizer, settings(data, max_steps=1, sample="1 plus"))
    assert "the tokenizer has no token that ends a text: rows are not ended" in outcome.notes


def test_no_adapter_of_no_numbers_comes_out(
    model: Any, data: Path, make_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last update has no loss after it that would show what it did."""
    real = AdapterTrainer.train

    def train(self: Any, **options: Any) -> Any:
        result = real(self, **options)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        trained[-1].data.view(-1)[3] = torch.inf
        return result

    monkeypatch.setattr(AdapterTrainer, "train", train)
    with pytest.raises(InputError, match=r"holds values that are no numbers in .*lora_B.*lower --learning"):
        finetune(model, make_tokenizer(), settings(data))
    assert not (data.parent / "out" / "adapter_model.safetensors").exists()
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"no numbers in .*lora_B.*it cannot be trained"):
        finetune(model, make_tokenizer(), settings(data))


@pytest.mark.parametrize(("trained", "why"), [(0, "nothing was trained before it"), (1, "lower --learning")])
def test_a_validation_loss_that_is_no_number_ends_a_run(
    trained: int, why: str, model: Any, data: Path, make_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = AdapterTrainer.evaluation_loop

    def evaluation_loop(self: Any, *args: Any, **options: Any) -> Any:
        found = real(self, *args, **options)
        if self.state.global_step == trained:
            found.metrics["eval_loss"] = float("nan")
        return found

    monkeypatch.setattr(AdapterTrainer, "evaluation_loop", evaluation_loop)
    with pytest.raises(InputError, match=f"the validation loss is nan at step {trained}: {why}"):
        finetune(model, make_tokenizer(), settings(data, evaluate_every=1))
