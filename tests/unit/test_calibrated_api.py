"""Calibrated solvers from Python: ``LoftQConfig(calibration=...)`` in ``get_peft_model``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from qlora_engine import LoftQConfig, LoraConfig, error_report, get_peft_model, inits
from qlora_engine import calibrated_model as module_under_test
from qlora_engine.calibration import calibrate
from qlora_engine.errors import InputError
from qlora_engine.inits import initialise
from qlora_engine.report import LayerReport
from quant import QuantizedTensor, QuantSpec, formats
from quant.linear import QuantLinear

NAMES = ["llama", "gpt2", "bert", "qwen3_moe"]
QUANTISING = [name for name in inits.names() if inits.get(name).quantizes]


def token_windows(count: int = 6, length: int = 48) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 384, (length,), generator=generator) for _ in range(count)]


def padded_batches() -> list[dict[str, Tensor]]:
    """What a tokenizer gives: the second text is shorter."""
    ids = torch.stack(token_windows(4)).view(2, 2, -1)
    mask = torch.ones_like(ids)
    mask[:, 1, 40:] = 0
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask)]


SOURCES: dict[str, Callable[[], Any]] = {
    "tensors": token_windows,
    "generator": lambda: (window for window in token_windows()),
    "lists of ids": lambda: [window.tolist() for window in token_windows()],
    "dicts": padded_batches,
    "one batch": lambda: {"input_ids": torch.stack(token_windows())},
    "DataLoader of dicts": lambda: DataLoader([{"input_ids": w} for w in token_windows()], batch_size=2),
    "DataLoader of tensors": lambda: DataLoader(TensorDataset(torch.stack(token_windows())), batch_size=4),
}


def adapt(model: nn.Module, calibration: Any, **options: Any) -> tuple[Any, list[LayerReport]]:
    settings = LoftQConfig(**{"loftq_bits": 3, "method": "recipe", "calibration": calibration, **options})
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="loftq", loftq_config=settings)
    adapted = get_peft_model(model, config)
    return adapted, list(error_report(adapted))


def check_layers(layers: list[LayerReport]) -> None:
    assert layers
    for layer in layers:
        if layer.name == "pooler.dense":  # sees one token of each window
            assert layer.note.endswith(" calibration tokens reached it; 64 are needed")
            continue
        assert layer.note == ""
        assert layer.output_error is not None
        assert layer.output_error_plain is not None
        assert layer.output_error < 0.85 * layer.output_error_plain, layer.name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("source", ["tensors", "DataLoader of dicts"])
def test_every_architecture(make_model: Callable[..., Any], name: str, source: str) -> None:
    model = make_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapted, layers = adapt(model, SOURCES[source]())
    check_layers(layers)
    linears = {key for key, value in before.items() if key.endswith("weight") and value.ndim == 2}
    assert {f"{layer.name}.weight" for layer in layers} <= linears
    ids = torch.stack(token_windows(2))
    plain = make_model(name)
    with torch.no_grad():
        got, want = adapted(input_ids=ids)[0], plain(input_ids=ids)[0]
    assert (got - want).norm() < 0.6 * want.norm()


@pytest.mark.parametrize("source", [s for s in SOURCES if s not in ("tensors", "DataLoader of dicts")])
def test_every_kind_of_source(make_model: Callable[..., Any], source: str) -> None:
    _, layers = adapt(make_model("llama"), SOURCES[source]())
    check_layers(layers)


def test_a_dataloader_gives_what_calibrating_its_windows_gives(make_model: Callable[..., Any]) -> None:
    loader = DataLoader([{"input_ids": window} for window in token_windows()], batch_size=3)
    a, _ = adapt(make_model("llama"), loader)
    b, _ = adapt(make_model("llama"), calibrate(make_model("llama"), token_windows()))
    for (name, mine), (_, theirs) in zip(a.named_parameters(), b.named_parameters()):
        assert torch.equal(mine, theirs), name


def test_padding_reaches_no_layer(make_model: Callable[..., Any]) -> None:
    one = [w[:40] if n % 2 else w for n, w in enumerate(token_windows(4))]
    a, _ = adapt(make_model("llama"), padded_batches())
    b, _ = adapt(make_model("llama"), one)
    for (name, mine), (_, theirs) in zip(a.named_parameters(), b.named_parameters()):
        assert torch.equal(mine, theirs), name


TEXTS = [f"Sentence number {n} of a text that says little, {n * n} times over again." for n in range(60)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_texts_with_a_tokenizer(
    make_model: Callable[..., Any], make_tokenizer: Callable[[], Any], name: str
) -> None:
    _, layers = adapt(make_model(name), TEXTS, tokenizer=make_tokenizer())
    check_layers(layers)


def test_texts_with_the_models_own_tokenizer(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_checkpoint("llama")
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS))
    by_source = []
    for given in (path, str(path)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        adapted, layers = adapt(model, given, calibration_windows=3, window=64)
        check_layers(layers)
        by_source.append(adapted.state_dict())
    assert all(torch.equal(value, by_source[1][key]) for key, value in by_source[0].items())


def test_texts_without_a_tokenizer_are_refused(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    with pytest.raises(InputError, match=r"needs a tokenizer; give LoftQConfig\(tokenizer=...\)"):
        adapt(model, TEXTS)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())  # nothing was touched


def test_a_calibration_its_file_or_a_dict(make_model: Callable[..., Any], tmp_path: Path) -> None:
    found = calibrate(make_model("llama"), token_windows())
    found.save(tmp_path / "c.safetensors")
    made = {name: found.hessian(name) for name in found}
    states = [
        adapt(make_model("llama"), given)[0].state_dict()
        for given in (found, tmp_path / "c.safetensors", str(tmp_path / "c.safetensors"), made)
    ]
    for state in states[1:]:
        assert all(torch.equal(value, state[key]) for key, value in states[0].items())


def test_moments_of_another_model_are_refused(make_model: Callable[..., Any], tmp_path: Path) -> None:
    found = calibrate(make_model("llama", seed=5), token_windows())
    with pytest.raises(InputError, match="made with another model"):
        adapt(make_model("llama"), found)
    found.save(tmp_path / "c.safetensors")
    model = make_model("llama")
    with pytest.raises(InputError, match="made with another model"):
        adapt(model, tmp_path / "c.safetensors")
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    with pytest.raises(ValueError, match=r"no second moment for 'model\.layers\.0\.self_attn\.q_proj'"):
        adapt(make_model("llama"), {"elsewhere": torch.eye(64)})


def test_what_cannot_be_solved_is_refused_before_texts_are_run(make_model: Callable[..., Any]) -> None:
    def texts() -> Iterator[Tensor]:
        raise AssertionError("read")
        yield

    settings = LoftQConfig(loftq_bits=3, calibration=texts(), propagate=True)
    config = LoraConfig(r=65, target_modules=["q_proj"], init_lora_weights="loftq", loftq_config=settings)
    with pytest.raises(InputError, match="rank 65"):
        get_peft_model(make_model("llama"), config)


def test_recipe_is_the_default_with_a_calibration() -> None:
    assert LoftQConfig(calibration=["text"]).method == "recipe"
    assert LoftQConfig().method == "loftq"
    assert LoftQConfig(method="qera", calibration=["text"]).method == "qera"


def test_a_method_without_its_calibration_is_refused(make_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"method='recipe' needs LoftQConfig\(calibration=...\)"):
        adapt(make_model("llama"), None)


def test_the_config_is_as_it_was(make_model: Callable[..., Any]) -> None:
    texts = token_windows()
    settings = LoftQConfig(loftq_bits=3, method="recipe", calibration=texts)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="loftq", loftq_config=settings)
    get_peft_model(make_model("llama"), config)
    assert config.loftq_config["calibration"] is texts  # type: ignore[index]
    again = get_peft_model(make_model("llama"), copy.copy(config))
    assert all(layer.output_error is not None for layer in error_report(again))


def test_a_config_with_live_texts_can_be_shown_and_saved(
    make_model: Callable[..., Any], tmp_path: Path
) -> None:
    adapted, _ = adapt(make_model("llama"), (window for window in token_windows()))
    config = adapted.peft_config["default"]
    assert config.to_dict()["loftq_config"]["loftq_bits"] == 3
    assert "calibration" not in config.to_dict()["loftq_config"]
    assert config.loftq_config["calibration"] is not None
    adapted.save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path).init_lora_weights is True


def test_layers_that_saw_too_little_are_solved_by_loftq(make_model: Callable[..., Any]) -> None:
    _, layers = adapt(make_model("llama"), [window[:8] for window in token_windows(3)])
    assert all(
        layer.note == "solved by loftq, not recipe: only 24 calibration tokens reached it; 64 are needed"
        for layer in layers
    )
    assert all(layer.error < layer.error_plain for layer in layers)


def test_embeddings_among_the_targets(make_model: Callable[..., Any]) -> None:
    settings = LoftQConfig(loftq_bits=4, calibration=token_windows())
    config = LoraConfig(
        r=4,
        target_modules=["embed_tokens", "q_proj"],
        init_lora_weights="loftq",
        loftq_config=settings,
    )
    layers = list(error_report(get_peft_model(make_model("llama"), config)))
    notes = {layer.name.rpartition(".")[2]: layer.note for layer in layers}
    assert notes == {"embed_tokens": "solved by loftq, not recipe: an embedding", "q_proj": ""}


def test_many_moments_wait_in_a_file(make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kept, _ = adapt(make_model("llama"), token_windows())
    monkeypatch.setattr(module_under_test, "_IN_MEMORY", 0)
    paths: list[Path] = []
    original = calibrate

    def watched(*args: Any, **options: Any) -> Any:
        paths.append(options["save_to"])
        return original(*args, **options)

    monkeypatch.setattr(module_under_test, "calibrate", watched)
    filed, _ = adapt(make_model("llama"), token_windows())
    assert len(paths) == 1
    assert not paths[0].exists()
    theirs = filed.state_dict()
    for name, mine in kept.state_dict().items():
        if mine.dtype == torch.uint8:
            assert (mine != theirs[name]).float().mean() < 0.01, name  # sums in another order
        else:
            torch.testing.assert_close(mine, theirs[name], rtol=0.02, atol=0.02, msg=name)


def _layers() -> Iterator[tuple[int, int]]:
    yield 40, 64  # rows of whole blocks
    yield 24, 80  # blocks that straddle rows


@pytest.mark.parametrize("shape", list(_layers()), ids=str)
@pytest.mark.parametrize("fmt", formats.names())
@pytest.mark.parametrize("method", QUANTISING)
def test_every_method_at_every_format(method: str, fmt: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    out_features, in_features = shape
    W = torch.randn(out_features, in_features, generator=generator)
    X = torch.randn(400, in_features, generator=generator) * torch.logspace(0, -1, in_features)
    known = inits.get(method)
    H = X.T @ X / 400
    done = initialise(W, method=method, rank=4, spec=QuantSpec(fmt, 64), iters=2, hessian=H, scaling=2.0)
    assert isinstance(done.base, QuantizedTensor)
    assert (done.base.spec.format, done.base.shape) == (fmt, shape)
    E = (W - done.base.dequantize(torch.float32) - 2.0 * done.B @ done.A).double()
    assert float(E.norm() / W.double().norm()) == pytest.approx(done.error, rel=1e-4)
    assert done.error_plain is not None
    assert done.output_error is not None
    assert done.output_error_plain is not None
    if known.needs_hessian:
        assert done.output_error < done.output_error_plain
    elif known.corrects:
        assert done.error < done.error_plain
    else:
        assert done.error == pytest.approx(done.error_plain, rel=1e-5)
