"""qlora-merge with adapters on stacked experts (``target_parameters``): held against PEFT's own merge."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.cli.test_merge import done, error, files, invoke, run_in_child, spoil_config, spoil_tensor
from tests.parity.releases import since
from tests.parity.test_peft_experts import adapter_of_before

peft = pytest.importorskip("peft")

pytestmark = since("0.20", "the factors of stacks lie otherwise, and former names of experts are unknown")
IDS = torch.arange(1, 25).reshape(2, 12)
# family -> what is adapted
TARGETS: dict[str, list[str]] = {
    "mixtral": ["gate_up_proj", "down_proj", "gate.weight"],
    "qwen3_moe": ["experts.gate_up_proj", "experts.down_proj"],
    "gpt_oss": ["gate_up_proj", "down_proj", "down_proj_bias"],  # one tensor on disk, (in, out)
    "granitemoe": ["gate_up_proj", "down_proj"],  # one tensor on disk, (out, in), under another name
}
# model -> rank and alpha of one of its stacks
PATTERNS = {"qwen3_moe": {"rank_pattern": {r".*\.gate_up_proj": 6}, "alpha_pattern": {r".*\.down_proj": 2}}}


def load(folder: Path) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def peft_adapter(base: Path, folder: Path, name: str, **options: Any) -> Any:
    """Save a random adapter with PEFT; the model that PEFT merges it into."""
    options = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj"], "init_lora_weights": False, **options}
    config = peft.LoraConfig(target_parameters=TARGETS[name], **PATTERNS.get(name, {}), **options)
    torch.manual_seed(1)
    model = peft.get_peft_model(load(base), config)
    model.save_pretrained(folder)
    return model.merge_and_unload().eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def same_weights(found: Any, expected: Any) -> None:
    wanted = dict(expected.named_parameters())
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("name", TARGETS)
def test_merged_as_peft_merges(
    name: str, rslora: bool, mixture: Callable[[str], Path], tmp_path: Path
) -> None:
    base = mixture(name)
    expected = peft_adapter(base, tmp_path / "adapter", name, use_rslora=rslora)
    result = done(invoke(base, tmp_path / "adapter", tmp_path / "out", "--max-shard-size", "70KB", "--json"))
    merged = load(tmp_path / "out")
    same_weights(merged, expected)
    torch.testing.assert_close(logits(merged), logits(expected), rtol=1e-4, atol=1e-5)
    assert (logits(merged) - logits(load(base))).abs().max() > 1e-3
    # the layout on disk stays what it was
    before, after = ({n: t.shape for f in d.glob("*.safetensors") for n, t in load_file(f).items()}
                     for d in (base, tmp_path / "out"))  # fmt: skip
    assert before == after
    # what is said of a tensor is true
    layers = [e for e in map(json.loads, result.out.splitlines()) if e["event"] == "layer"]
    tensors = [
        {n: t for f in d.glob("*.safetensors") for n, t in load_file(f).items()}
        for d in (base, tmp_path / "out")
    ]
    assert len(layers) == sum(bool((tensors[0][n] != tensors[1][n]).any()) for n in tensors[0])
    for layer in layers:
        old, new = (t[layer["name"]] for t in tensors)
        assert layer["delta"] == pytest.approx(((new - old).norm() / old.norm()).item(), rel=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_adapters_of_single_experts_merge_into_single_experts(
    name: str, mixture: Callable[[str], Path], tmp_path: Path
) -> None:
    base = mixture(name)
    adapter_of_before(name, tmp_path / "adapter")
    expected = peft.PeftModel.from_pretrained(load(base), tmp_path / "adapter").merge_and_unload()
    done(invoke(base, tmp_path / "adapter", tmp_path / "out"))
    same_weights(load(tmp_path / "out"), expected)


def test_a_stack_saved_as_one_tensor_is_merged(mixture: Callable[[str], Path], tmp_path: Path) -> None:
    """A layout that transformers reads, too: Qwen3-MoE's tensors named and stacked as in memory."""
    base, source = tmp_path / "base", mixture("qwen3_moe")
    shutil.copytree(source, base)
    for file in base.glob("model*"):
        file.unlink()
    load(source).save_pretrained(base, save_original_format=False)
    tensors = load_file(base / "model.safetensors")
    assert tensors["model.layers.0.mlp.experts.gate_up_proj"].dim() == 3
    expected = peft_adapter(source, tmp_path / "adapter", "qwen3_moe")
    done(invoke(base, tmp_path / "adapter", tmp_path / "out"))
    same_weights(load(tmp_path / "out"), expected)
    adapter_of_before("qwen3_moe", tmp_path / "single", router=False)
    message = error(invoke(base, tmp_path / "single", tmp_path / "out2"))
    assert "one expert of 'model.layers.0.mlp.experts." in message
    assert "has no tensor of that expert alone" in message


def test_half_precision_and_requantised_linears(mixture: Callable[[str], Path], tmp_path: Path) -> None:
    base = mixture("mixtral")
    expected = peft_adapter(base, tmp_path / "adapter", "mixtral")
    result = done(invoke(base, tmp_path / "adapter", tmp_path / "out", "--dtype", "bfloat16"))
    assert result.err == ""
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    experts = half.model.layers[1].mlp.experts.down_proj
    assert torch.equal(experts, expected.model.layers[1].mlp.experts.down_proj.bfloat16())
    result = done(invoke(base, tmp_path / "adapter", tmp_path / "q", "--requantize", "nf4"))
    assert "note: stacked experts are merged and stay dense" in result.err
    import qlora_engine as qe

    model = qe.from_pretrained(tmp_path / "q")
    assert model.model.layers[0].self_attn.q_proj.spec.format == "nf4"
    experts = model.model.layers[0].mlp.experts
    torch.testing.assert_close(
        experts.gate_up_proj, expected.model.layers[0].mlp.experts.gate_up_proj, rtol=1e-5, atol=1e-6
    )


def test_merged_into_the_output_of_loftq_init(mixture: Callable[[str], Path], tmp_path: Path) -> None:
    """A bitsandbytes base whose experts are dense."""
    import qlora_engine as qe
    from tests.cli.command import invoke as loftq_init

    base = tmp_path / "base"
    assert loftq_init(mixture("mixtral"), base, "--rank", 4, "--device", "cpu").code == 0
    options = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}
    config = qe.LoraConfig(target_parameters=["gate_up_proj", "down_proj"], **options)
    model = qe.get_peft_model(qe.from_pretrained(base, dtype=torch.float32), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    done(invoke(base, tmp_path / "adapter", tmp_path / "out", "--dtype", "float32"))
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), rtol=1e-4, atol=1e-5)


KEY = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
INNER = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight"
BAD: list[tuple[str, Callable[[Path], Any], str]] = [
    ("lacks one", lambda f: spoil_tensor(f, lambda t: t.pop(INNER)), "gate_up_proj' (4, 192, 64) has A"),
    (
        "lacks both",
        lambda f: spoil_tensor(f, lambda t: [t.pop(INNER), t.pop(INNER.replace("_B", "_A"))]),
        "has no factors for 'model.layers.0.mlp.experts.gate_up_proj'",
    ),
    ("rank", lambda f: spoil_config(f, r=8), "rank 8 need (8, 64) and (4, 8)"),
    (
        "other width",
        lambda f: spoil_tensor(f, lambda t: t.update({KEY: t[KEY][:, :9].clone()})),
        "its shape (4, 64, 96) and rank 4 need (16, 96) and (64, 16)",
    ),
    (
        "no such parameter",
        lambda f: spoil_config(f, target_parameters=["down_proj"]),
        "no Parameter of the model is in their place",
    ),
    ("no list", lambda f: spoil_config(f, target_parameters="down_proj"), "must be a list of strings"),
    ("no names", lambda f: spoil_config(f, target_parameters=[["down_proj"]]), "not a list of names"),
    (
        "bias",
        lambda f: spoil_tensor(
            f, lambda t: t.update({KEY.replace("lora_A.weight", "lora_B.bias"): torch.zeros(64)})
        ),
        "has a lora_A and a lora_B; 'model.layers.0.mlp.experts.down_proj'",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), [(s, m) for _, s, m in BAD], ids=[n for n, _, _ in BAD])
def test_what_does_not_fit_is_one_line_before_anything_is_written(
    spoil: Callable[[Path], Any], message: str, mixture: Callable[[str], Path], tmp_path: Path
) -> None:
    base = mixture("mixtral")
    peft_adapter(base, tmp_path / "adapter", "mixtral")
    spoil(tmp_path / "adapter")
    assert message in error(invoke(base, tmp_path / "adapter", tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_name_that_is_no_parameter_is_told(mixture: Callable[[str], Path], tmp_path: Path) -> None:
    base = mixture("mixtral")
    peft_adapter(base, tmp_path / "adapter", "mixtral")
    spoil_config(tmp_path / "adapter", target_parameters=[*TARGETS["mixtral"], "up_projs"])
    result = done(invoke(base, tmp_path / "adapter", tmp_path / "out"))
    assert result.err == "note: target_parameters: 'up_projs' is no Parameter of MixtralForCausalLM\n"


def test_an_expert_that_is_missing_is_one_line(mixture: Callable[[str], Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    load(mixture("mixtral")).save_pretrained(base)
    peft_adapter(base, tmp_path / "adapter", "mixtral")
    tensors = load_file(base / "model.safetensors")
    gone = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    save_file({n: t for n, t in tensors.items() if n != gone}, base / "model.safetensors", {"format": "pt"})
    message = error(invoke(base, tmp_path / "adapter", tmp_path / "out"))
    assert "'model.layers.1.mlp.experts.gate_up_proj', which is put together from several tensors" in message
    broken = {**tensors, gone: tensors[gone] * float("nan")}
    save_file(broken, base / "model.safetensors", {"format": "pt"})
    message = error(invoke(base, tmp_path / "adapter", tmp_path / "out", "--safe"))
    assert f"'{gone}' is not finite after merging" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_killed_and_resumed_gives_the_same_files(mixture: Callable[[str], Path], tmp_path: Path) -> None:
    base = mixture("granitemoe")  # a stack is one tensor: a kill falls between its experts, too
    peft_adapter(base, tmp_path / "adapter", "granitemoe")
    arguments = (base, tmp_path / "adapter", "--max-shard-size", "60KB")
    done(invoke(*arguments[:2], tmp_path / "whole", *arguments[2:]))
    expected = files(tmp_path / "whole")
    for kill_at in (9, 20, 30):
        out = tmp_path / f"out{kill_at}"
        assert run_in_child(kill_at, *arguments[:2], out, *arguments[2:]) == -signal.SIGKILL
        done(invoke(*arguments[:2], out, *arguments[2:], "--resume"))
        assert files(out) == expected


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_merged_into_quantised_experts(name: str, mixture: Callable[[str], Path], tmp_path: Path) -> None:
    """Dense: what the adapted model is. Requantised: what quantising that gives; untouched codes are kept."""
    import qlora_engine as qe
    from quant import QuantSpec
    from quant.tensor import quantize
    from tests.cli.command import invoke as loftq_init

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    done_init = loftq_init(mixture(name), base, "--bits", 3, "--rank", 4, "--device", "cpu")
    assert done_init.code == 0, done_init.err
    options = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj"], "init_lora_weights": False}
    config = qe.LoraConfig(target_parameters=["down_proj"], **options)
    model = qe.get_peft_model(qe.from_pretrained(base, dtype=torch.float32), config).eval()
    model.save_pretrained(adapter)
    want = logits(model)
    done(invoke(base, adapter, tmp_path / "dense", "--dtype", "float32", "--max-shard-size", "60KB"))
    merged = load(tmp_path / "dense")
    torch.testing.assert_close(logits(merged), want, rtol=1e-4, atol=1e-5)
    result = done(invoke(base, adapter, tmp_path / "q", "--requantize", "nf4", "--json"))
    layers = {e["name"]: e for e in map(json.loads, result.out.splitlines()) if e["event"] == "layer"}
    assert len(layers) == 2 + 8  # two q_proj, four experts in each of two layers
    again, before = qe.from_pretrained(tmp_path / "q"), qe.from_pretrained(base)
    for number in range(2):
        path = f"model.layers.{number}.mlp.experts"
        stacks = [m.get_submodule(path) for m in (again, before, merged)]
        for n in range(4):
            kept, old = (stack.gate_up_proj.layers[n] for stack in stacks[:2])
            assert torch.equal(kept.codes, old.codes)
            exact = stacks[2].down_proj[n]
            exact = exact.T.contiguous() if name == "gpt_oss" else exact
            layer = stacks[0].down_proj.layers[n]
            assert layer.spec == QuantSpec("nf4")
            close = quantize(exact.detach(), layer.spec).dequantize(torch.float32)
            error = (layer.dequantize(torch.float32) - close).norm() / close.norm()
            assert error < 1e-3  # a code on an edge may fall to either side
            record = layers[f"{path}.down_proj.{n}.weight"]
            found = (layer.dequantize(torch.float32) - exact).norm() / exact.norm()
            assert record["error"] == pytest.approx(found.item(), rel=1e-3)
            assert 0 < record["survived"] < 1.5
    fingerprint = json.loads((tmp_path / "q" / "quantization_fingerprint.json").read_text())
    assert "model.layers.0.mlp.experts.gate_up_proj.3" in fingerprint["modules"]
