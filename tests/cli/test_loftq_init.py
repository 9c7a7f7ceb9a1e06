"""What loftq-init writes: loaded by the stock stack, it is the solved model that the report describes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qlora_engine.adapter_io import factor_names
from qlora_engine.checkpoint import Checkpoint
from qlora_engine.fingerprint import Fingerprint, module_digest
from qlora_engine.report import RunReport
from quant import QuantizedTensor, QuantSpec
from quant.bnb_format import from_bnb, from_linear4bit
from tests.cli.command import files, invoke

MakeCheckpoint = Callable[..., Path]
# On CPUs with AVX-512 bitsandbytes 0.50 misreads rows that are no multiple of the block: give it others.
WIDE = {
    "llama": {"intermediate_size": 128},
    "llama_tied": {"intermediate_size": 128},
    "qwen3": {"intermediate_size": 128},
    "gpt2": {"n_inner": 128},
    "bert": {"intermediate_size": 128},
    "t5": {"d_ff": 128},
}
# More than rounding, less than anything that would matter: errors are about .08.
SAME = 2e-5


def original(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    return {name: entry.read() for name, entry in Checkpoint.open(folder).tensors.items()}


def weight_of(tensors: dict[str, Tensor], path: str) -> Tensor:
    """A module's weight by the model's path, whether or not the checkpoint has the base model's prefix."""
    for name in (f"{path}.weight", f"{path}.weight".partition(".")[2]):
        if name in tensors:
            return tensors[name].float()
    raise KeyError(path)


def load_stock(out: Path) -> tuple[Any, Any, dict[str, Any]]:
    """The model and its PEFT model as a user of transformers, bitsandbytes and peft loads them."""
    import transformers

    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    name = json.loads((out / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(out, output_loading_info=True)
    return model, peft.PeftModel.from_pretrained(model, out / "loftq_init", is_trainable=True), info


def product(layer: Any) -> Tensor:
    """scaling * B @ A of a PEFT layer, in the base's orientation (out, in)."""
    if layer.lora_embedding_A:
        A, B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
        return layer.scaling["default"] * (B @ A).T
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer.scaling["default"] * (B @ A)


def dense_weight(base: Any) -> Tensor:
    """The weight of a base layer as PEFT sees it, (out, in)."""
    from transformers.pytorch_utils import Conv1D

    bnb = pytest.importorskip("bitsandbytes")
    if isinstance(base, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).float()
    return base.weight.float().T if isinstance(base, Conv1D) else base.weight.float()


def check_stock(out: Path, source: Path) -> RunReport:
    """Load ``out`` with the stock stack and compare every layer with the report and the original."""
    report = RunReport.read(out)
    tensors = original(source)
    _, peft_model, info = load_stock(out)
    assert not info["missing_keys"] or set(info["missing_keys"]) <= {"lm_head.weight"}, info
    assert not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    modules = dict(peft_model.base_model.model.named_modules())
    adapted = {name for name, module in modules.items() if getattr(module, "lora_A", None) is not None}
    adapted = {name for name in adapted if hasattr(modules[name], "base_layer")}
    assert adapted == {layer.name for layer in report.layers if layer.rank}
    for layer in report.layers:
        module = modules[layer.name]
        base = module.base_layer if layer.rank else module
        W = weight_of(tensors, layer.name)
        W = W.T if layer.kind == "conv1d" else W
        correction = product(module) if layer.rank else 0.0
        error = torch.linalg.norm(W - dense_weight(base) - correction) / torch.linalg.norm(W)
        # The stock stack rounds the base to the model's dtype: a norm moves by no more than what is added.
        slack = float(torch.finfo(getattr(torch, report.dtype)).eps) / 2 + SAME
        assert error.item() == pytest.approx(layer.error, abs=slack), layer.name
        if layer.rank:
            assert module.scaling["default"] == pytest.approx(layer.scaling)
    return report


def linear4bit(model: Any) -> dict[str, Any]:
    bnb = pytest.importorskip("bitsandbytes")
    return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


@pytest.mark.parametrize(
    ("name", "dtype", "shard_size", "layers"),
    [
        ("llama", torch.bfloat16, "60KB", 14),
        ("llama_tied", torch.float16, "5GB", 14),
        ("qwen3", torch.float32, "5GB", 14),
        ("gpt2", torch.float32, "5GB", 8),
        ("bert", torch.float16, "5GB", 13),
        ("t5", torch.bfloat16, "5GB", 28),
        ("qwen3_moe", torch.bfloat16, "5GB", 8),
        ("mixtral", torch.float16, "5GB", 8),
    ],
)
def test_stock_stack_gives_the_solved_model(
    tmp_path: Path,
    make_checkpoint: MakeCheckpoint,
    name: str,
    dtype: torch.dtype,
    shard_size: str,
    layers: int,
) -> None:
    source = make_checkpoint(name, dtype=dtype, shard_size=shard_size, **WIDE.get(name, {}))
    result = invoke(source, tmp_path / "out", "--rank", 4, "--alpha", 8, "--max-shard-size", "70KB")
    assert result.code == 0, result.err
    report = check_stock(tmp_path / "out", source)
    assert report.save_format == "bnb"
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert len(report.layers) == layers
    assert all(layer.error < 0.92 * layer.error_plain for layer in report.layers)
    assert report.bytes_out == sum(
        entry.nbytes for entry in Checkpoint.open(tmp_path / "out").tensors.values()
    )
    quantised = {layer.name for layer in report.layers}
    model, _, _ = load_stock(tmp_path / "out")
    assert {n.removesuffix(".base_layer") for n in linear4bit(model)} == quantised


def needs_fp4() -> None:
    """Skip with a bitsandbytes that has no FP4 on CPUs, as 0.46.1."""
    bnb = pytest.importorskip("bitsandbytes")
    packed, state = bnb.functional.quantize_4bit(torch.ones(64), quant_type="nf4")
    state.quant_type = "fp4"
    try:
        bnb.functional.dequantize_4bit(packed, state)
    except RuntimeError as error:
        pytest.skip(f"bitsandbytes {bnb.__version__}: {error}")


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("scales", ["absmax", "mse", "signed-mse"])
@pytest.mark.parametrize("format_", ["nf4", "fp4"])
def test_stock_stack_loads_every_bnb_variant(
    tmp_path: Path, make_checkpoint: MakeCheckpoint, double: bool, scales: str, format_: str
) -> None:
    if format_ == "fp4":
        needs_fp4()
    source = make_checkpoint("llama", **WIDE["llama"])
    nested = "--double-quant" if double else "--no-double-quant"
    result = invoke(
        source,
        tmp_path / "out",
        "--rank",
        4,
        nested,
        "--scales",
        scales,
        "--format",
        format_,
        "--block-size",
        32,
    )
    assert result.code == 0, result.err
    check_stock(tmp_path / "out", source)


def test_what_is_not_quantised_is_untouched(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    source = make_checkpoint("llama", shard_size="60KB", **WIDE["llama"])
    assert invoke(source, tmp_path / "out", "--rank", 4).code == 0
    before, after = original(source), original(tmp_path / "out")
    quantised = {f"{layer.name}.weight" for layer in RunReport.read(tmp_path / "out").layers}
    for name, tensor in before.items():
        if name not in quantised:
            assert after[name].dtype == tensor.dtype
            assert torch.equal(after[name], tensor)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    config, own = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", source))
    assert config.pop("quantization_config")["bnb_4bit_compute_dtype"] == "float16"
    assert config == own


def test_saved_codes_are_what_bitsandbytes_makes_of_the_solved_base(
    tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    """Quantising the dequantised base again with bitsandbytes itself gives the bytes that were written."""
    F = pytest.importorskip("bitsandbytes.functional")
    source = make_checkpoint("llama", dtype=torch.float32, **WIDE["llama"])
    assert invoke(source, tmp_path / "out", "--rank", 4).code == 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for layer in RunReport.read(tmp_path / "out").layers:
        name = f"{layer.name}.weight"
        q = from_bnb(name, tensors)
        codes, state = F.quantize_4bit(q.dequantize(torch.float32), blocksize=64, quant_type="nf4")
        assert torch.equal(codes.reshape(-1), q.codes)
        assert torch.equal(state.absmax, q.scales)
        packed = state.as_dict(packed=True)
        assert torch.equal(packed["absmax"], tensors[f"{name}.absmax"])
        assert torch.equal(packed["quant_map"], tensors[f"{name}.quant_map"])
        key = "quant_state.bitsandbytes__nf4"
        assert torch.equal(packed[key], tensors[f"{name}.{key}"])


@pytest.mark.parametrize(
    "extra", [["--alpha", 2], ["--alpha", 32], ["--rslora"], ["--rslora", "--alpha", 64]]
)
def test_scaling_does_not_change_the_result(
    tmp_path: Path, make_checkpoint: MakeCheckpoint, extra: list[Any]
) -> None:
    source = make_checkpoint("llama", **WIDE["llama"])
    assert invoke(source, tmp_path / "one", "--rank", 4).code == 0
    assert invoke(source, tmp_path / "two", "--rank", 4, *extra).code == 0
    one, two = RunReport.read(tmp_path / "one"), RunReport.read(tmp_path / "two")
    assert {layer.scaling for layer in two.layers} != {1.0}
    assert [layer.error for layer in two.layers] == pytest.approx(
        [layer.error for layer in one.layers], rel=1e-6
    )
    check_stock(tmp_path / "two", source)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_patterns_reach_peft(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    needs_fp4()
    source = make_checkpoint("llama", **WIDE["llama"])
    patterns = ["--rank-pattern", r"layers\.0\..*=2", "--rank-pattern", "k_proj=8"]
    patterns += ["--alpha-pattern", "mlp.up_proj=24"]
    patterns += ["--bits-pattern", "q_proj=fp4/32", "--bits-pattern", "down.*=nf4/128"]
    result = invoke(source, tmp_path / "out", "--rank", 4, *patterns)
    assert result.code == 0, result.err
    report = check_stock(tmp_path / "out", source)
    layers = {layer.name.removeprefix("model.layers."): layer for layer in report.layers}
    assert layers["0.self_attn.k_proj"].rank == 2  # the first pattern that matches wins
    assert layers["1.self_attn.k_proj"].rank == 8
    assert layers["1.mlp.up_proj"].scaling == 6
    assert (layers["0.self_attn.q_proj"].format, layers["0.self_attn.q_proj"].block_size) == ("fp4", 32)
    assert (layers["0.mlp.down_proj"].format, layers["0.mlp.down_proj"].block_size) == ("nf4", 128)
    assert layers["0.self_attn.v_proj"].block_size == 64


def test_chosen_modules_only(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    source = make_checkpoint("llama", **WIDE["llama"])
    result = invoke(source, tmp_path / "out", "--rank", 4, "--target-modules", "q_proj,v_proj")
    assert result.code == 0, result.err
    report = check_stock(tmp_path / "out", source)
    assert {layer.name.rpartition(".")[2] for layer in report.layers} == {"q_proj", "v_proj"}
    assert len(report.layers) == 4
    config = json.loads((tmp_path / "out" / "loftq_init" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    skipped = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"][
        "llm_int8_skip_modules"
    ]
    assert {"lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.k_proj"} <= set(skipped)


def test_the_rest_without_an_adapter(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    source = make_checkpoint("llama", **WIDE["llama"])
    result = invoke(
        source, tmp_path / "out", "--rank", 4, "--target-modules", ".*(q|v)_proj", "--exclude-modules",
        "model.layers.0.self_attn.q_proj", "--quantize-rest",
    )  # fmt: skip
    assert result.code == 0, result.err
    report = check_stock(tmp_path / "out", source)
    assert len(report.layers) == 14
    assert [layer.name for layer in report.layers if layer.rank] == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    assert all(layer.error == layer.error_plain for layer in report.layers if not layer.rank)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_dense(tmp_path: Path, make_checkpoint: MakeCheckpoint, name: str) -> None:
    source = make_checkpoint(name, dtype=torch.float32)
    result = invoke(source, tmp_path / "out", "--rank", 4, "--bits", 2, "--save-format", "dense")
    assert result.code == 0, result.err
    report = check_stock(tmp_path / "out", source)
    assert report.dtype == "float16"
    after = original(tmp_path / "out")
    assert after.keys() == original(source).keys()
    assert {tensor.dtype for tensor in after.values()} <= {torch.float16, torch.int64}
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize(
    ("bits", "format_", "extra"),
    [(2, "nf2", []), (3, "nf3", ["--double-quant"]), (8, "int8", []), (4, "nf4", ["--block-size", 16])],
)
def test_native(
    tmp_path: Path, make_checkpoint: MakeCheckpoint, bits: int, format_: str, extra: list[Any]
) -> None:
    source = make_checkpoint("gpt2")
    result = invoke(source, tmp_path / "out", "--rank", 4, "--bits", bits, *extra)
    assert result.code == 0, result.err
    assert "note: saved in the native format: bitsandbytes" in result.out.replace("\n", " ")
    check_native(tmp_path / "out", source)
    report = RunReport.read(tmp_path / "out")
    assert {layer.format for layer in report.layers} == {format_}
    largest = max(report.layers, key=lambda layer: layer.numel)
    assert largest.bits_per_weight < bits + 3  # small layers carry a large share of scales and maps


def check_native(out: Path, source: Path) -> None:
    """The native files decode to the base that the report's errors are about."""
    tensors, weights = original(out), original(source)
    adapter = load_file(out / "loftq_init" / "adapter_model.safetensors")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    report = RunReport.read(out)
    assert config["quant_method"] == "qlora_engine"
    assert config["quantized_modules"] == [layer.name for layer in report.layers]
    for layer in report.layers:
        spec = QuantSpec.from_dict(config["modules"].get(layer.name, config["spec"]))
        assert (spec.format, spec.block_size, spec.double_quant) == (
            layer.format,
            layer.block_size,
            layer.double_quant,
        )
        fields = {}
        for field in ("codes", "scales", "zeros", "nested_scales", "nested_offset", "nested_map"):
            if f"{layer.name}.{field}" in tensors:
                data = tensors[f"{layer.name}.{field}"].reshape(-1)
                assert data.dtype == torch.uint8
                is_code = field in ("codes", "zeros") or (field == "scales" and spec.double_quant)
                fields[field] = data if is_code else data.view(torch.float32)
        q = QuantizedTensor.from_state_dict(fields, layer.shape, torch.float16, spec)
        assert sum(value.nbytes for value in fields.values()) == layer.bytes_out == q.nbytes
        assert f"{layer.name}.weight" not in tensors
        W = weight_of(weights, layer.name)
        W = W.T if layer.kind == "conv1d" else W
        left = W - q.dequantize(torch.float32)
        A, B = (adapter[name] for name in factor_names(layer.name, layer.kind))
        change = layer.scaling * (B @ A)
        left -= change.T if layer.kind == "embedding" else change
        assert float(left.norm() / W.norm()) == pytest.approx(layer.error, abs=SAME)


def test_embedding(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    source = make_checkpoint("llama", **WIDE["llama"])
    result = invoke(source, tmp_path / "out", "--rank", 4, "--target-modules", "embed_tokens,q_proj")
    assert result.code == 0, result.err
    assert [layer.kind for layer in RunReport.read(tmp_path / "out").layers] == [
        "embedding",
        "linear",
        "linear",
    ]
    check_native(tmp_path / "out", source)
    assert (
        invoke(
            source,
            tmp_path / "dense",
            "--rank",
            4,
            "--target-modules",
            "embed_tokens",
            "--save-format",
            "dense",
        ).code
        == 0
    )
    check_stock(tmp_path / "dense", source)


@pytest.mark.parametrize("method", ["loftq", "qpissa", "qlora"])
def test_methods(tmp_path: Path, make_checkpoint: MakeCheckpoint, method: str) -> None:
    source = make_checkpoint("llama", **WIDE["llama"])
    option = "--init" if method == "qpissa" else "--method"
    result = invoke(source, tmp_path / "out", "--rank", 4, option, method)
    assert result.code == 0, result.err
    report = check_stock(tmp_path / "out", source)
    assert report.run["options"]["method"] == method
    gains = [layer.gain for layer in report.layers]
    assert max(gains) == 0 if method == "qlora" else min(gains) > 0.05


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_converts_the_rest(tmp_path: Path, make_checkpoint: MakeCheckpoint, dtype: str) -> None:
    source = make_checkpoint("llama", dtype=torch.float32, **WIDE["llama"])
    result = invoke(source, tmp_path / "out", "--rank", 4, "--dtype", dtype, "--adapter-dtype", dtype)
    assert result.code == 0, result.err
    wanted = getattr(torch, dtype)
    tensors, before = original(tmp_path / "out"), original(source)
    assert torch.equal(tensors["model.norm.weight"], before["model.norm.weight"].to(wanted))
    assert torch.equal(tensors["lm_head.weight"], before["lm_head.weight"].to(wanted))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["quantization_config"]["bnb_4bit_compute_dtype"] == dtype
    adapter = load_file(tmp_path / "out" / "loftq_init" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {wanted}
    model, _, _ = load_stock(tmp_path / "out")
    assert model.dtype == wanted
    check_stock(tmp_path / "out", source)


def test_float16_overflow_is_refused(tmp_path: Path, make_model: Callable[..., Any]) -> None:
    model = make_model("llama", dtype=torch.bfloat16)
    model.model.norm.weight.data[3] = 1e30
    model.save_pretrained(tmp_path / "model")
    message = invoke(tmp_path / "model", tmp_path / "out", "--rank", 4, "--dtype", "float16").error()
    assert (
        "'model.norm.weight' has values up to 1e+30, beyond float16's 65504; use --dtype bfloat16" in message
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_fingerprint_is_that_of_the_loaded_model(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    source = make_checkpoint("llama", **WIDE["llama"])
    assert invoke(source, tmp_path / "out", "--rank", 4, "--double-quant").code == 0
    written = Fingerprint.read(tmp_path / "out")
    assert written is not None
    assert written == Fingerprint.read(tmp_path / "out" / "loftq_init")
    model, _, _ = load_stock(tmp_path / "out")
    loaded = {name.removesuffix(".base_layer"): from_linear4bit(m) for name, m in linear4bit(model).items()}
    again = Fingerprint(
        {name: q.spec for name, q in loaded.items()},
        {name: module_digest(q) for name, q in loaded.items()},
        "float16",
    )
    assert again.differences(written) == []
    assert again.codes_sha256 == written.codes_sha256
    assert invoke(source, tmp_path / "other", "--rank", 5, "--double-quant").code == 0
    other = Fingerprint.read(tmp_path / "other")
    assert other is not None
    assert "has other codes or scales" in written.differences(other)[0]


def test_same_command_same_bytes(
    tmp_path: Path, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint("llama", shard_size="60KB", **WIDE["llama"])
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert invoke(source, "out", "--rank", 4, "--max-shard-size", "40KB").code == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")
    index = json.loads((tmp_path / "one" / "out" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "one" / "out").glob("model-*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [shard.name for shard in shards]
    assert len(shards) > 2
    for shard in shards:
        tensors = load_file(shard)
        assert all(index["weight_map"][name] == shard.name for name in tensors)
        assert sum(t.nbytes for t in tensors.values()) <= 40_000 or len(tensors) == 1


def test_trained_further_in_the_stock_stack(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    source = make_checkpoint("llama", dtype=torch.float32, **WIDE["llama"])
    assert invoke(source, tmp_path / "out", "--rank", 4).code == 0
    _, model, _ = load_stock(tmp_path / "out")
    ids = torch.arange(3, 35).reshape(2, 16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.25


def test_rows_that_bitsandbytes_misreads_on_a_cpu_are_noted(
    tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    """The files are right, as bitsandbytes' portable code shows; a note says its AVX-512 kernel is not."""
    bnb = pytest.importorskip("bitsandbytes")
    portable = pytest.importorskip("bitsandbytes.backends.default.ops")
    if not hasattr(portable, "_dequantize_4bit_compute"):
        pytest.skip(f"bitsandbytes {bnb.__version__} has its portable code elsewhere")
    source = make_checkpoint("llama")  # rows of 96
    result = invoke(source, tmp_path / "out", "--rank", 4)
    assert "note: 2 layers have rows that are no multiple of their block" in result.out
    model, peft_model, _ = load_stock(tmp_path / "out")
    weights = original(source)
    for layer in RunReport.read(tmp_path / "out").layers:
        module = peft_model.base_model.model.get_submodule(layer.name)
        weight = module.base_layer.weight
        state = weight.quant_state
        base = portable._dequantize_4bit_compute(
            weight.data.reshape(-1), state.absmax, state.code, state.blocksize, state.shape, torch.float32
        )
        W = weights[f"{layer.name}.weight"].float()
        assert ((W - base - product(module)).norm() / W.norm()).item() == pytest.approx(layer.error, abs=SAME)
        stock = bnb.functional.dequantize_4bit(weight.data, state).float()
        misread = torch.backends.cpu.get_cpu_capability() == "AVX512" and layer.shape[1] % 64 != 0
        assert torch.allclose(stock, base, atol=1e-4) != misread
    assert len(linear4bit(model)) == 14
    assert (
        "multiple of their block" not in invoke(source, tmp_path / "b", "--rank", 4, "--block-size", 32).out
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("save_format", ["bnb", "native", "dense"])
def test_engine_loads_what_the_stock_stack_loads(
    tmp_path: Path,
    make_checkpoint: MakeCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    save_format: str,
) -> None:
    """The same logits from this engine, without bitsandbytes, for every save format of one solution."""
    import sys

    import qlora_engine

    source = make_checkpoint(name, dtype=torch.float32, **WIDE[name])
    for folder, chosen in (("bnb", "bnb"), ("other", save_format)):
        options = ["--rank", 4, "--alpha", 8, "--save-format", chosen, "--dtype", "float32"]
        assert invoke(source, tmp_path / folder, *options).code == 0
    ids = torch.arange(3, 35).reshape(2, 16)
    with torch.no_grad():
        _, stock, _ = load_stock(tmp_path / "bnb")
        for layer in linear4bit(stock.eval()).values():
            layer.train()  # in eval mode, bitsandbytes repacks and computes in bfloat16 on some CPUs
        wanted = stock(input_ids=ids)[0]
        in_bfloat16 = stock.eval()(input_ids=ids)[0]
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        model = qlora_engine.from_pretrained(tmp_path / "other")
        model = qlora_engine.PeftModel.from_pretrained(model, tmp_path / "other" / "loftq_init")
        found = model.eval()(input_ids=ids)[0]
    largest = wanted.abs().max().item()
    assert (found - wanted).abs().max().item() < 1e-5 * largest
    assert (found - in_bfloat16).abs().max().item() < 1e-2 * largest


def test_other_classes_on_the_same_files(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    """The base alone, and with a new head: the same modules are dense, and the head is not 4-bit."""
    import transformers

    pytest.importorskip("bitsandbytes")
    source = make_checkpoint("llama", **WIDE["llama"])
    assert invoke(source, tmp_path / "out", "--rank", 4, "--exclude-modules", "v_proj").code == 0
    base, info = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    dense = [name for name, module in base.named_modules() if type(module) is torch.nn.Linear]
    assert dense == ["layers.0.self_attn.v_proj", "layers.1.self_attn.v_proj"]
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", num_labels=3
    )
    assert type(classifier.score) is torch.nn.Linear


def test_classifier(tmp_path: Path) -> None:
    """A head that is no output embedding stays dense, and no task type makes PEFT train a copy of it."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=384, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "model")
    assert invoke(tmp_path / "model", tmp_path / "out", "--rank", 4).code == 0
    report = check_stock(tmp_path / "out", tmp_path / "model")
    assert len(report.layers) == 13
    _, loaded, _ = load_stock(tmp_path / "out")
    assert torch.equal(loaded.base_model.model.classifier.weight, model.classifier.weight)
    written = json.loads((tmp_path / "out" / "loftq_init" / "adapter_config.json").read_text())
    assert written["auto_mapping"]["base_model_class"] == "BertForSequenceClassification"
    assert written["task_type"] is None
    assert written["modules_to_save"] is None
