"""qlora-merge on small real files: what comes out is the adapted model, whatever base and adapter are."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import qlora_engine as qe
from qlora_engine.cli import merge
from tests.cli.command import ROOT, Result
from tests.cli.command import invoke as loftq_init
from tests.cli.test_loftq_init_resume import in_child, interfere
from tests.conftest import MODELS

MakeCheckpoint = Callable[..., Path]
IDS = torch.arange(1, 13).reshape(2, 6)


def invoke(*arguments: Any) -> Result:
    """``qlora-merge`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            merge.main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = exit_.code
    return Result(code, out.getvalue(), err.getvalue())


def error(result: Result) -> str:
    """The one line of an error; asserts that it is one, with status 2 and nothing on stdout."""
    assert (result.code, result.out) == (2, ""), result
    (line,) = [text for text in result.err.splitlines() if not text.startswith("note: ")]
    assert line.startswith("qlora-merge: error: ")
    return line.removeprefix("qlora-merge: error: ")


def done(result: Result) -> Result:
    assert result.code == 0, result.err
    return result


@torch.no_grad()
def run(model: Any) -> torch.Tensor:
    kwargs = {"decoder_input_ids": IDS} if getattr(model.config, "is_encoder_decoder", False) else {}
    return model(input_ids=IDS, **kwargs)[0].float()


def load(name: str, folder: Path, **kwargs: Any) -> Any:
    """With plain transformers; asserts that every tensor found its place."""
    auto = getattr(transformers, MODELS[name][1])
    model, info = auto.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def adapter(base: Any, folder: Path, **options: Any) -> torch.Tensor:
    """Save an adapter with random weights; the output of ``base`` with it. ``base`` is used up."""
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 10, "init_lora_weights": False, **options}
    model = qe.get_peft_model(base, qe.LoraConfig(**options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape) * 0.05
            parameter.data = (parameter.data.float() + noise).to(parameter.dtype)
    expected = run(model.eval())
    model.save_pretrained(folder, save_embedding_layers=False)
    return expected


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "gpt2 conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "bert": ("bert", {"target_modules": ["query", "value"]}),
    "t5 rslora": ("t5", {"target_modules": ["q", "v", "wo"], "use_rslora": True}),
    "qwen3_moe": ("qwen3_moe", {"target_modules": ["q_proj", "v_proj"]}),
    "mixtral": ("mixtral", {"target_modules": ["q_proj", "v_proj"]}),
    "dora": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "dora conv1d": ("gpt2", {"target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True}),
    "lora_bias": ("bert", {"target_modules": ["query", "value"], "lora_bias": True}),
    "bias all": ("bert", {"target_modules": ["query"], "bias": "all"}),
    "bias lora_only": ("bert", {"target_modules": ["query"], "bias": "lora_only"}),
    "modules_to_save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "patterns": (
        "llama",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
            "alpha_pattern": {"v_proj": 1},
        },
    ),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    "tokens tied": ("llama_tied", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    "embedding tied": ("llama_tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head tied": ("llama_tied", {"target_modules": ["lm_head", "q_proj"]}),
    "head saved tied": ("llama_tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_merged_dense_base_is_the_adapted_model(
    case: str, tmp_path: Path, make_model: Any, make_checkpoint: MakeCheckpoint
) -> None:
    name, options = CASES[case]
    base = make_checkpoint(name, dtype=torch.float32, shard_size="60KB")
    expected = adapter(load(name, base), tmp_path / "adapter", **options)
    done(invoke(base, tmp_path / "adapter", tmp_path / "out", "--max-shard-size", "100KB"))
    merged = load(name, tmp_path / "out")
    # float32 sums in another order; outputs are of size 1 to 5
    torch.testing.assert_close(run(merged), expected, rtol=1e-5, atol=1e-5)
    before, after = (json.loads((f / "config.json").read_text()) for f in (base, tmp_path / "out"))
    changed = {key for key in {*before, *after} if before.get(key) != after.get(key)}
    assert changed <= ({"tie_word_embeddings"} if "tied" in case and "tokens" not in case else set())
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "method"),
    [
        (("--format", "nf4"), "bnb"),
        (("--format", "nf4", "--double-quant", "--block-size", 32), "bnb"),
        (("--format", "fp4"), "bnb"),
        (("--format", "nf3"), "native"),
        (("--format", "int8"), "native"),
        (("--format", "nf2", "--target-modules", "q_proj,embed_tokens", "--rank", 4), "native"),
        (("--format", "nf4", "--save-format", "dense"), "dense"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merged_output_of_loftq_init(
    name: str, arguments: tuple[Any, ...], method: str, tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    if name == "gpt2" and "q_proj,embed_tokens" in arguments:
        pytest.skip("GPT-2's embedding is tied and is not quantised")
    base, out = tmp_path / "base", tmp_path / "out"
    source = make_checkpoint(name, shard_size="60KB")
    assert loftq_init(source, base, *arguments, "--device", "cpu", "--rank", 4).code == 0
    model = qe.PeftModel.from_pretrained(qe.from_pretrained(base, dtype=torch.float32), base / "loftq_init")
    expected = run(model.eval())
    result = done(invoke(base, base / "loftq_init", out, "--max-shard-size", "50KB", "--json"))
    plan = json.loads(result.out.splitlines()[0])
    assert plan["base"] == method
    assert plan["notes"] == []
    assert plan["dtype"] == "float16"
    merged = load(name, out)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert {p.dtype for p in merged.parameters()} == {torch.float16}
    # the result is rounded to float16: 2^-11 of weights, outputs of size 0.5
    torch.testing.assert_close(run(merged.float()), expected, rtol=2e-3, atol=1e-3)
    full = done(invoke(base, base / "loftq_init", tmp_path / "full", "--dtype", "float32"))
    assert full.err == ""
    torch.testing.assert_close(run(load(name, tmp_path / "full")), expected, rtol=1e-5, atol=2e-5)


def test_merged_bitsandbytes_checkpoint_of_transformers(
    tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    """Not written by us: 4-bit and LLM.int8 as transformers saves them."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    source = make_checkpoint("llama", dtype=torch.bfloat16)
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = load("llama", source, quantization_config=settings)
    assert isinstance(model.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    model.save_pretrained(tmp_path / "base")
    expected = adapter(
        qe.from_pretrained(tmp_path / "base", dtype=torch.float32),
        tmp_path / "adapter",
        target_modules=["q_proj"],
    )
    done(invoke(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "--dtype", "float32"))
    torch.testing.assert_close(run(load("llama", tmp_path / "out")), expected, rtol=1e-5, atol=2e-5)


def test_merged_int8_checkpoint(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    source = make_checkpoint("llama", dtype=torch.float32)
    base = tmp_path / "base"
    shutil.copytree(source, base)
    # older releases of safetensors map the file, which is written over below
    tensors = {name: tensor.clone() for name, tensor in load_file(base / "model.safetensors").items()}
    dense = dict(tensors)
    for name in [n for n in tensors if n.endswith("q_proj.weight")]:
        scb = tensors[name].abs().amax(dim=1)
        tensors[name] = (tensors[name] * 127 / scb[:, None]).round().to(torch.int8)
        dense[name] = tensors[name].float() * scb[:, None] / 127
        tensors[name.removesuffix("weight") + "SCB"] = scb
        tensors[name.removesuffix("weight") + "weight_format"] = torch.tensor(0, dtype=torch.uint8)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (base / "config.json").write_text(json.dumps(config))
    model = load("llama", source)
    model.load_state_dict(dense)
    expected = adapter(model, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    done(invoke(base, tmp_path / "adapter", tmp_path / "out"))
    torch.testing.assert_close(run(load("llama", tmp_path / "out")), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("fmt", "written"), [("nf4", "bnb"), ("nf3", "native"), ("int8", "native")])
@pytest.mark.parametrize("kind", ["dense", "nf4", "uint4"])
def test_requantised_result_loads_and_says_what_survived(
    kind: str, fmt: str, written: str, tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    base = source = make_checkpoint("llama")
    if kind != "dense":
        base = tmp_path / "base"
        assert loftq_init(source, base, "--format", kind, "--device", "cpu", "--rank", 4).code == 0
    model = qe.from_pretrained(base, dtype=torch.float32)
    adapter(model, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    dense, out = tmp_path / "dense", tmp_path / "out"
    done(invoke(base, tmp_path / "adapter", dense, "--dtype", "float32"))
    result = done(
        invoke(base, tmp_path / "adapter", out, "--requantize", fmt, "--json", "--max-shard-size", "40KB")
    )
    events = [json.loads(line) for line in result.out.splitlines()]
    layers = {e["name"]: e for e in events if e["event"] == "layer"}
    assert len(layers) == 4
    # a uint4 layer that is kept cannot be in bitsandbytes' layout
    assert events[0]["save_format"] == (written if kind != "uint4" else "native")
    loaded = qe.from_pretrained(out, dtype=torch.float32)
    exact = load("llama", dense)
    unmerged = qe.from_pretrained(base, dtype=torch.float32)
    for name, module in loaded.named_modules():
        if not hasattr(module, "spec"):
            continue
        W, W_exact = module.dequantize(torch.float32), exact.get_submodule(name).weight
        record = layers.get(f"{name}.weight")
        if record is None:
            assert torch.equal(module.codes, unmerged.get_submodule(name).codes), name  # kept as it was
            continue
        assert module.spec.format == fmt
        assert record["error"] == pytest.approx(((W - W_exact).norm() / W_exact.norm()).item(), rel=1e-3)
        assert 0 < record["survived"] < 1.5
    assert loaded.config.quantization_config["quant_method"] == "qlora_engine"
    if written == "bnb" and kind != "uint4":
        pytest.importorskip("bitsandbytes")
        assert transformers.AutoModelForCausalLM.from_pretrained(out).is_loaded_in_4bit
    fingerprint = json.loads((out / "quantization_fingerprint.json").read_text())
    assert set(fingerprint["modules"]) == {n for n, m in loaded.named_modules() if hasattr(m, "spec")}


def test_adapter_written_by_peft(tmp_path: Path, make_model: Any, make_checkpoint: MakeCheckpoint) -> None:
    peft = pytest.importorskip("peft")
    base = make_checkpoint("bert", dtype=torch.float32)
    options = {"target_modules": ["query"], "init_lora_weights": False, "use_dora": True, "bias": "all"}
    model = peft.get_peft_model(load("bert", base), peft.LoraConfig(**options, modules_to_save=["pooler"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.05
    expected = run(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    done(invoke(base, tmp_path / "adapter", tmp_path / "out"))
    torch.testing.assert_close(run(load("bert", tmp_path / "out")), expected, rtol=1e-5, atol=1e-5)


def test_classifier_on_a_language_model(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    base = make_checkpoint("llama", dtype=torch.float32)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    expected = adapter(model, tmp_path / "adapter", target_modules=["q_proj"], task_type="SEQ_CLS")
    result = done(invoke(base, tmp_path / "adapter", tmp_path / "out"))
    assert "the result is a LlamaForSequenceClassification" in result.err
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert merged.config.num_labels == 3
    torch.testing.assert_close(run(merged), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_grown_vocabulary(name: str, tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    base = make_checkpoint(name, dtype=torch.float32)
    model = load(name, base)
    model.resize_token_embeddings(400)
    torch.manual_seed(1)
    config = qe.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = qe.get_peft_model(model, config).eval()
    expected = run(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    (tmp_path / "adapter" / "tokenizer_config.json").write_text('{"grown": true}')
    done(invoke(base, tmp_path / "adapter", tmp_path / "out"))
    merged = load(name, tmp_path / "out")
    assert merged.config.vocab_size == 400
    torch.testing.assert_close(run(merged), expected, rtol=1e-5, atol=1e-5)
    assert "grown" in (tmp_path / "out" / "tokenizer_config.json").read_text()


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_a_vocabulary_that_grew_in_one_place(
    name: str, tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    """The result could not be loaded: its embedding and its head would not fit together."""
    base = make_checkpoint("llama", dtype=torch.float32)
    config = qe.LoraConfig(target_modules=["q_proj"], modules_to_save=[name])
    qe.get_peft_model(load("llama", base), config).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    grown = next(key for key in tensors if name in key)
    save_file({**tensors, grown: torch.cat([tensors[grown], torch.ones(16, 64)])}, path)
    message = error(invoke(base, tmp_path / "adapter", tmp_path / "out"))
    assert f"{name}.weight' for 400 tokens, and '" in message
    assert "would be for 384; save the adapter with both" in message
    assert not (tmp_path / "out").exists()


def test_positions_are_no_vocabulary(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    base = make_checkpoint("gpt2", dtype=torch.float32)
    config = qe.LoraConfig(target_modules=["c_attn"], modules_to_save=["wpe"], fan_in_fan_out=True)
    qe.get_peft_model(load("gpt2", base), config).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    grown = next(key for key in tensors if "wpe" in key)
    save_file({**tensors, grown: torch.cat([tensors[grown], torch.ones(16, 64)])}, path)
    message = error(invoke(base, tmp_path / "adapter", tmp_path / "out"))
    assert "has shape (144, 64), the model has (128, 64) there" in message


# ---- the command


def test_real_process_prints_what_it_did(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    base = make_checkpoint("llama")
    adapter(load("llama", base).float(), tmp_path / "adapter", target_modules=["q_proj"])
    command = [sys.executable, "-m", "qlora_engine.cli.merge", base, "adapter", "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    first, last = result.stdout.splitlines()
    assert first.startswith("Merged 2 weights in ")
    assert last == "Wrote out; transformers loads it"
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert [layer["name"] for layer in report["layers"]] == [
        f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)
    ]
    assert all(0 < layer["delta"] < 10 for layer in report["layers"])
    assert report["peak_rss"] > 1e8


def test_output_options(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    base = make_checkpoint("llama")
    adapter(load("llama", base).float(), tmp_path / "adapter", target_modules=["q_proj"])
    folders = (base, tmp_path / "adapter", tmp_path / "out")
    shown = done(invoke(*folders, "--dry-run"))
    assert "LlamaForCausalLM, dense base: 2 weights change" in shown.out
    assert not (tmp_path / "out").exists()
    quiet = done(invoke(*folders, "--quiet"))
    assert (quiet.out, quiet.err) == ("", "")
    assert "exists and is not empty" in error(invoke(*folders))
    lines = [json.loads(line) for line in done(invoke(*folders, "--overwrite", "--json")).out.splitlines()]
    assert [line["event"] for line in lines] == ["plan", "layer", "layer", "done"]
    assert not lines[1]["kept"]
    version = invoke("--version")
    assert version.out.startswith("qlora-merge ")
    assert "--requantize" in invoke("--help").out


def spoil_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def spoil_tensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BAD: list[tuple[str, Callable[[Path], Any], str]] = [
    (
        "no config",
        lambda f: (f / "adapter_config.json").unlink(),
        "is not an adapter: it has no adapter_config",
    ),
    ("no weights", lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    ("other type", lambda f: spoil_config(f, peft_type="IA3"), "peft_type is 'IA3'; only LORA is known here"),
    ("unknown field", lambda f: spoil_config(f, use_bdlora={"nblocks": 2}), "use_bdlora"),
    (
        "pissa",
        lambda f: spoil_config(f, init_lora_weights="pissa"),
        "initialised by pissa, which changed its base",
    ),
    ("no magnitude", lambda f: spoil_config(f, use_dora=True), "has no DoRA magnitude"),
    (
        "key twice",
        lambda f: (f / "adapter_config.json").write_text(
            (f / "adapter_config.json").read_text().replace("{", '{"lora_alpha": 64,', 1)
        ),
        "'lora_alpha' appears twice",
    ),
    ("rank", lambda f: spoil_config(f, r=8), "has rank 4, adapter_config.json says 8"),
    ("half", lambda f: spoil_tensor(f, lambda t: t.pop(A0)), "is incomplete: it lacks lora_A or lora_B"),
    (
        "shape",
        lambda f: spoil_tensor(f, lambda t: t.update({A0: t[A0][:, :9].clone()})),
        "its weight (64, 64) needs",
    ),
    (
        "other model",
        lambda f: spoil_tensor(
            f, lambda t: [t.update({k.replace("q_proj", "x"): t.pop(k)}) for k in list(t)]
        ),
        "'model.layers.0.self_attn.x', which is not there in LlamaForCausalLM",
    ),
    (
        "unknown tensor",
        lambda f: spoil_tensor(f, lambda t: t.update({"base_model.model.score.weight": torch.zeros(2, 64)})),
        "has a tensor for 'score.weight', which LlamaForCausalLM does not have",
    ),
    (
        "bias of nothing",
        lambda f: spoil_tensor(
            f, lambda t: t.update({A0.replace("lora_A.weight", "lora_B.bias"): torch.zeros(64)})
        ),
        "adds to 'model.layers.0.self_attn.q_proj.bias', and the base has no such bias",
    ),
    (
        "truncated",
        lambda f: os.truncate(f / "adapter_model.safetensors", 600),
        "is not a valid safetensors file",
    ),
    (
        "pickle",
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "a pickle that could run code",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), [(s, m) for _, s, m in BAD], ids=[n for n, _, _ in BAD])
def test_bad_adapter_is_one_line_and_leaves_nothing(
    spoil: Callable[[Path], Any], message: str, tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    base = make_checkpoint("llama")
    adapter(load("llama", base).float(), tmp_path / "adapter", target_modules=["q_proj"])
    spoil(tmp_path / "adapter")
    assert message in error(invoke(base, tmp_path / "adapter", tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_bad_options_and_bases(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    base = make_checkpoint("llama")
    adapter(load("llama", base).float(), tmp_path / "adapter", target_modules=["q_proj"])
    good = (base, tmp_path / "adapter", tmp_path / "out")
    for arguments, message in [
        ((*good, "--dtype", "int8"), "--dtype 'int8'"),
        ((*good, "--requantize", "nf5"), "--requantize 'nf5'"),
        ((*good, "--requantize", "nf4", "--block-size", "0"), "block_size"),
        ((*good, "--max-shard-size", "big"), "'big' is not a size"),
        ((tmp_path / "none", *good[1:]), "no such folder"),
        ((base, tmp_path / "none", good[2]), "no such folder"),
        ((base, base, good[2]), "is not an adapter"),
        ((*good[:2], good[1]), "would be lost"),
        (good[:2], "Missing argument 'OUT'"),
    ]:
        assert message in error(invoke(*arguments)), arguments
    gptq = tmp_path / "gptq"
    shutil.copytree(base, gptq)
    config = json.loads((gptq / "config.json").read_text())
    (gptq / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    assert "is quantised with 'gptq'; readable: bitsandbytes" in error(invoke(gptq, *good[1:]))
    assert not good[2].exists()


def test_overflow_and_nan_are_refused(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    base = make_checkpoint("llama")
    adapter(load("llama", base).float(), tmp_path / "adapter", target_modules=["q_proj"])
    good = (base, tmp_path / "adapter", tmp_path / "out")
    spoil_tensor(tmp_path / "adapter", lambda t: t.update({A0: t[A0] * 1e7}))
    message = error(invoke(*good))
    assert "q_proj.weight' has values up to" in message
    assert "beyond float16's 65504; use --dtype bfloat16" in message
    assert done(invoke(*good, "--dtype", "bfloat16")).code == 0
    spoil_tensor(tmp_path / "adapter", lambda t: t.update({A0: t[A0] * float("nan")}))
    message = error(invoke(*good, "--overwrite", "--safe", "--dtype", "bfloat16"))
    assert "model.layers.0.self_attn.q_proj.weight' is not finite after merging" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]
    told = done(invoke(*good, "--overwrite", "--dtype", "bfloat16", "--quiet")).err
    assert told.startswith("warning: 1 merged weights are not finite, first 'model.layers.0.self_attn.q")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_without_a_scale_are_refused(
    tmp_path: Path, make_checkpoint: MakeCheckpoint, dtype: torch.dtype
) -> None:
    base = Path(shutil.copytree(make_checkpoint("llama"), tmp_path / "base"))
    tensors = {name: tensor.clone() for name, tensor in load_file(base / "model.safetensors").items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name].to(dtype)}, base / "model.safetensors", {"format": "pt"})
    adapter(load("llama", make_checkpoint("llama")), tmp_path / "adapter", target_modules=["q_proj"])
    message = error(invoke(base, tmp_path / "adapter", tmp_path / "out"))
    assert f"'{name}' has dtype" in message
    assert "only F16, BF16, F32, F64 can be merged" in message
    adapter(load("llama", make_checkpoint("llama")), tmp_path / "other", target_modules=["v_proj"])
    done(invoke(base, tmp_path / "other", tmp_path / "out"))  # what the adapter leaves alone is copied
    copied = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert torch.equal(copied.float(), tensors[name].to(dtype).float())


def test_another_base_than_the_adapters_is_told(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    source = make_checkpoint("llama")
    for name, fmt in (("one", "nf4"), ("two", "fp4")):
        assert loftq_init(source, tmp_path / name, "--format", fmt, "--rank", 4, "--device", "cpu").code == 0
    result = done(invoke(tmp_path / "two", tmp_path / "one" / "loftq_init", tmp_path / "out"))
    assert "was made for another quantised base" in result.err
    result = done(invoke(source, tmp_path / "one" / "loftq_init", tmp_path / "out2"))
    assert "has no fingerprint and may not be it" in result.err


# ---- killed and resumed


def files(folder: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name != "merge_report.json"}


def run_in_child(kill_at: int, *arguments: Any) -> int:
    return in_child(kill_at, lambda: invoke(*arguments).code)


@pytest.mark.parametrize("requantize", [(), ("--requantize", "nf4")], ids=["dense", "nf4"])
def test_killed_anywhere_and_resumed_gives_the_same_files(
    requantize: tuple[str, ...], tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    base = make_checkpoint("llama", shard_size="60KB")
    adapter(load("llama", base).float(), tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    arguments = ("--max-shard-size", "60KB", *requantize)
    with interfere(-1, lambda: None) as count:
        done(invoke(base, tmp_path / "adapter", tmp_path / "reference", *arguments))
    assert count[0] > 20
    expected = files(tmp_path / "reference")
    absent = 0
    for kill_at in range(0, count[0], 5):
        out = tmp_path / "out"
        assert run_in_child(kill_at, base, tmp_path / "adapter", out, *arguments) == -signal.SIGKILL
        if out.exists():
            assert files(out) == expected
        else:
            absent += 1
        assert run_in_child(-1, base, tmp_path / "adapter", out, *arguments, "--resume") == 0
        assert files(out) == expected
        assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "out", "reference"]
        shutil.rmtree(out)
    assert absent > 5


@pytest.mark.parametrize(
    "report", ["{", "[" * 100_000, "[]", '{"layers": [3]}', '{"layers": [], "notes": []}']
)
def test_a_report_of_something_else_is_no_finished_merge(
    report: str, tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    base, out = make_checkpoint("llama"), tmp_path / "out"
    adapter(load("llama", base).float(), tmp_path / "adapter", target_modules=["q_proj"])
    out.mkdir()
    (out / "merge_report.json").write_text(report)
    assert "exists and is not empty" in error(invoke(base, tmp_path / "adapter", out, "--resume"))


@pytest.mark.parametrize("notes", ["{", "[]", "{}", '{"layers": [{"shape": 3}]}'])
def test_damaged_notes_of_an_unfinished_run_are_one_line(
    notes: str, tmp_path: Path, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = make_checkpoint("llama", shard_size="60KB"), tmp_path / "out"
    adapter(load("llama", base).float(), tmp_path / "adapter", target_modules=["q_proj"])
    arguments = (base, tmp_path / "adapter", out, "--max-shard-size", "60KB")
    from qlora_engine import merge_pipeline

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge_pipeline, "_assemble", fail)
    error(invoke(*arguments))
    monkeypatch.undo()
    path = sorted((tmp_path / ".out.unfinished" / "pieces").glob("*.json"))[0]
    path.write_text(notes)
    assert path.name in error(invoke(*arguments, "--resume"))
    assert done(invoke(*arguments)).code == 0


def test_resume_keeps_finished_files_and_refuses_another_run(
    tmp_path: Path, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_checkpoint("llama", shard_size="60KB")
    adapter(load("llama", base).float(), tmp_path / "adapter", target_modules=["q_proj"])
    arguments = (base, tmp_path / "adapter", tmp_path / "out", "--max-shard-size", "60KB")
    from qlora_engine import merge_pipeline

    real, calls = merge_pipeline.rename_into_place, []

    def fail(temporary: Path, path: Path) -> None:
        calls.append(path)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        real(temporary, path)

    monkeypatch.setattr(merge_pipeline, "rename_into_place", fail)
    message = error(invoke(*arguments))
    assert "No space left on device; finished files are kept in" in message
    assert "--resume goes on" in message
    monkeypatch.undo()
    assert "an unfinished run for" in error(invoke(*arguments))
    assert "this is not the same run: options.dtype" in error(
        invoke(*arguments, "--resume", "--dtype", "float32")
    )
    lines = [json.loads(t) for t in done(invoke(*arguments, "--resume", "--json")).out.splitlines()]
    kept = [line["kept"] for line in lines if line["event"] == "layer"]
    assert kept == [True, False]
    copy_of = copy.copy(arguments)
    done(invoke(*copy_of[:2], tmp_path / "again", *copy_of[3:]))
    assert files(tmp_path / "again") == files(tmp_path / "out")
