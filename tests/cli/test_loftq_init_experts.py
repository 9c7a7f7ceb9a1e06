"""``loftq-init`` on mixtures of experts: quantised one by one, whatever the disk has of them."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import qlora_engine as qe
from qlora_engine.report import RunReport
from quant import QuantSpec
from quant.experts import QuantExperts
from quant.tensor import quantize
from tests.cli.command import files, invoke
from tests.cli.test_loftq_init_propagate import run_in_child
from tests.parity.releases import since

IDS = torch.arange(1, 25).reshape(2, 12)


def dense(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def stacks(model: Any) -> dict[str, QuantExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantExperts)}


def every_weight(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.mark.parametrize(
    ("name", "options", "spec"),
    [
        ("mixtral", ("--bits", 3), QuantSpec("nf3")),
        ("gpt_oss", ("--bits", 2, "--double-quant", "--block-size", 32), QuantSpec("nf2", 32, True)),
        ("qwen3_moe", ("--bits", 4, "--quantize-experts"), QuantSpec("nf4")),
        ("mixtral", ("--bits", 8), QuantSpec("int8")),
        ("gpt_oss", ("--bits", 3), QuantSpec("nf3")),
    ],
    ids=str,
)
def test_every_expert_is_what_quantising_it_alone_gives(
    name: str, options: tuple[Any, ...], spec: QuantSpec, mixture: Any, tmp_path: Path
) -> None:
    base, out = mixture(name), tmp_path / "out"
    given = (*options, "--rank", 4, "--device", "cpu", "--max-shard-size", "50KB", "--verify", "--json")
    done = invoke(base, out, *given)
    assert done.code == 0, done.err
    events = [json.loads(line) for line in done.out.splitlines()]
    plan, verified = events[0], events[-1]
    assert verified["event"] == "verified"
    assert plan["save_format"] == "native"
    assert any("experts in 4 stacks" in note and "without adapters" in note for note in plan["notes"])
    experts = [layer for layer in plan["layers"] if ".experts." in layer["name"]]
    assert len(experts) == 16
    assert all(layer["rank"] == 0 for layer in experts)
    reference, model = dense(base), qe.from_pretrained(out, dtype=torch.float32)
    assert len(stacks(model)) == 4
    for path, stack in stacks(model).items():
        weights = reference.get_parameter(path)
        for number, layer in enumerate(stack.layers):
            W = weights[number].T.contiguous() if name == "gpt_oss" else weights[number]
            q = quantize(W.detach(), spec)
            assert layer.spec == spec
            assert torch.equal(layer.dequantize(torch.float32), q.dequantize(torch.float32))
        weights.data = stack.dense()
    for path, module in model.named_modules():
        if hasattr(module, "spec") and not path.rpartition(".")[2].isdecimal():
            reference.get_submodule(path).weight.data = module.dequantize(torch.float32)
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-5)
    # the bytes are those that were planned, and no dense expert is among them
    assert sum(t.numel() * t.element_size() for t in every_weight(out).values()) == plan["bytes_out"]
    report = {layer.name: layer for layer in RunReport.read(out).layers}
    for layer in experts:
        assert 0 < report[layer["name"]].error == report[layer["name"]].error_plain
    again = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(model))


def test_one_tensor_an_expert_or_one_for_all_gives_the_same(mixture: Any, tmp_path: Path) -> None:
    source, stacked = mixture("qwen3_moe"), tmp_path / "stacked"
    shutil.copytree(source, stacked)
    for file in stacked.glob("model*"):
        file.unlink()
    dense(source).save_pretrained(stacked, save_original_format=False)
    for name, base in (("a", source), ("b", stacked)):
        assert invoke(base, tmp_path / name, "--bits", 3, "--rank", 4, "--device", "cpu").code == 0
    a, b = every_weight(tmp_path / "a"), every_weight(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_which_experts_are_quantised(mixture: Any, tmp_path: Path) -> None:
    base = mixture("mixtral")

    def plan(*options: Any) -> dict[str, Any]:
        done = invoke(base, tmp_path / "out", "--rank", 4, "--dry-run", "--json", *options)
        assert done.code == 0, done.err
        return json.loads(done.out.splitlines()[0])

    def experts(facts: dict[str, Any]) -> list[dict[str, Any]]:
        return [layer for layer in facts["layers"] if ".experts." in layer["name"]]

    four = plan()
    assert four["save_format"] == "bnb"  # what the stock stack loads stays the default
    assert not experts(four)
    assert any("--quantize-experts quantises them" in note for note in four["notes"])
    assert len(experts(plan("--quantize-experts"))) == 16
    assert len(experts(plan("--save-format", "native"))) == 16
    assert not experts(plan("--bits", 3, "--no-quantize-experts"))
    assert not experts(plan("--save-format", "dense"))
    assert len(experts(plan("--bits", 3, "--exclude-modules", "down_proj"))) == 8
    assert not experts(plan("--bits", 3, "--exclude-modules", "experts"))
    assert len(experts(plan("--bits", 3, "--exclude-modules", r".*layers\.0\..*experts"))) == 8
    mixed = plan("--bits", 4, "--quantize-experts", "--bits-pattern", "gate_up_proj=2")
    widths = {layer["name"].split(".")[-2]: layer["format"] for layer in experts(mixed)}
    assert widths == {"gate_up_proj": "nf2", "down_proj": "nf4"}
    assert not any("matches no quantised module" in note for note in mixed["notes"])
    for save_format in ("bnb", "dense"):
        done = invoke(base, tmp_path / "out", "--quantize-experts", "--save-format", save_format)
        assert f"--quantize-experts with --save-format {save_format}" in done.error()


@pytest.mark.parametrize("more", [(), ("--target-parameters", "down_proj")])
def test_a_stack_is_excluded_whole_or_not_at_all(more: tuple[str, ...], mixture: Any, tmp_path: Path) -> None:
    one = "model.layers.0.mlp.experts.down_proj.2"
    for excluded in (one, r".*\.layers\.0\..*down_proj\.[23]"):
        done = invoke(mixture("gpt_oss"), tmp_path / "out", "--bits", 3, "--exclude-modules", excluded, *more)
        message = done.error()
        assert message.startswith(f"--exclude-modules: '{one}' is one expert of '{one.removesuffix('.2')}'")
    assert not list(tmp_path.iterdir())


def test_training_and_merging_on_quantised_experts(mixture: Any, tmp_path: Path) -> None:
    base, out = mixture("mixtral"), tmp_path / "out"
    assert invoke(base, out, "--bits", 3, "--rank", 4, "--device", "cpu").code == 0
    model = qe.PeftModel.from_pretrained(
        qe.from_pretrained(out, dtype=torch.float32), out / "loftq_init", is_trainable=True
    )
    config = qe.LoraConfig(r=4, target_parameters=["gate_up_proj", "down_proj"], target_modules=["q_proj"])
    trained = qe.get_peft_model(qe.from_pretrained(out, dtype=torch.float32), config).train()
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(20):
        loss = trained(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    trained.save_pretrained(tmp_path / "adapter")
    again = qe.PeftModel.from_pretrained(qe.from_pretrained(out, dtype=torch.float32), tmp_path / "adapter")
    torch.testing.assert_close(logits(again.eval()), logits(trained.eval()))
    want = logits(trained)
    torch.testing.assert_close(logits(trained.merge_and_unload()), want, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(logits(model.eval())).all()


def test_budget_counts_the_experts(mixture: Any, tmp_path: Path) -> None:
    base, out = mixture("mixtral"), tmp_path / "out"
    given = ("--budget", 3.2, "--rank", 4, "--device", "cpu", "--quantize-experts", "--verify")
    done = invoke(base, out, *given)
    assert done.code == 0, done.err
    layers = RunReport.read(out).layers
    bits = sum(layer.bits_per_weight * layer.numel for layer in layers) / sum(layer.numel for layer in layers)
    assert bits <= 3.2
    by_stack: dict[str, set[Any]] = {}
    for layer in layers:
        if ".experts." in layer.name:
            spec = (layer.format, layer.block_size, layer.double_quant)
            by_stack.setdefault(layer.name.rpartition(".")[0], set()).add(spec)
    assert len(by_stack) == 4
    assert all(len(specs) == 1 for specs in by_stack.values())  # one width for a stack


def test_calibrated_and_propagated_runs_quantise_them_plainly(
    mixture: Any, texts: Path, tmp_path: Path
) -> None:
    given = ("--bits", 3, "--rank", 4, "--calibration", texts, "--window", 64, "--method", "qera")
    plain = tmp_path / "plain"
    assert invoke(mixture("qwen3_moe"), plain, "--bits", 3, "--rank", 4, "--device", "cpu").code == 0
    for name, more in (("a", ()), ("b", ("--propagate",))):
        done = invoke(mixture("qwen3_moe"), tmp_path / name, *given, *more, "--verify", "--device", "cpu")
        assert done.code == 0, done.err
        mine, other = every_weight(tmp_path / name), every_weight(plain)
        experts = [key for key in other if ".experts." in key]
        assert experts
        assert all(torch.equal(mine[key], other[key]) for key in experts)


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_bytes(mixture: Any, tmp_path: Path) -> None:
    given = ("--bits", 3, "--rank", 4, "--max-shard-size", "30KB", "--device", "cpu")
    (tmp_path / "whole").mkdir()
    assert run_in_child(-1, mixture("qwen3_moe"), tmp_path / "whole" / "out", *given) == 0
    wanted = files(tmp_path / "whole" / "out")
    for kill_at in (12, 60, 110, 150):
        out = tmp_path / str(kill_at) / "out"
        out.parent.mkdir()
        assert run_in_child(kill_at, mixture("qwen3_moe"), out, *given) == -signal.SIGKILL
        assert run_in_child(-1, mixture("qwen3_moe"), out, *given, "--resume") == 0
        ours = files(out)
        for each in (ours, wanted):
            each.pop("loftq_init/adapter_config.json", None)  # it names its folder
        assert ours == wanted


def test_damaged_outputs_and_inputs_are_one_line(mixture: Any, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    dense(mixture("mixtral")).save_pretrained(base)
    # copies: the file is written over
    tensors = {name: tensor.clone() for name, tensor in load_file(base / "model.safetensors").items()}
    gone = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    save_file({n: t for n, t in tensors.items() if n != gone}, base / "model.safetensors", {"format": "pt"})
    done = invoke(base, out, "--bits", 3, "--rank", 4, "--dry-run")
    assert done.code == 0
    assert "1 stacks of experts stay dense, e.g." in " ".join(done.out.split())
    broken = {**tensors, gone: tensors[gone] * float("nan")}
    save_file(broken, base / "model.safetensors", {"format": "pt"})
    message = invoke(base, out, "--bits", 3, "--rank", 4, "--device", "cpu").error()
    assert "model.layers.1.mlp.experts.gate_up_proj.3" in message
    assert invoke(mixture("mixtral"), out, "--bits", 3, "--rank", 4, "--device", "cpu").code == 0
    stored = load_file(out / "model.safetensors")
    key = "model.layers.0.mlp.experts.down_proj.2.codes"
    save_file({n: t for n, t in stored.items() if n != key}, out / "model.safetensors", {"format": "pt"})
    from qlora_engine.errors import InputError

    with pytest.raises(InputError, match=r"down_proj\.2"):
        qe.from_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["quantized_modules"].remove("model.layers.0.mlp.experts.down_proj.2")
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"has 4 experts, and 2 are missing"):
        qe.from_pretrained(out)


def effective(folder: Path) -> dict[str, torch.Tensor]:
    """Every stack of the quantised model with the adapter merged into it."""
    model = qe.PeftModel.from_pretrained(
        qe.from_pretrained(folder, dtype=torch.float32), folder / "loftq_init"
    )
    merged = model.merge_and_unload()
    return {n: p.detach() for n, p in merged.named_parameters() if p.dim() == 3}


def adapted_experts(base: Path, out: Path, scaling: str) -> None:
    given = ("--bits", 3, "--rank", 4, "--alpha", 10, scaling, "--device", "cpu", "--verify")
    given += ("--target-parameters", "gate_up_proj,experts.down_proj", "--rank-pattern", "down_proj=6")
    done = invoke(base, out, *given, "--target-modules", "q_proj")
    assert done.code == 0, done.err


EACH = pytest.mark.parametrize(("name", "scaling"), [("mixtral", "--no-rslora"), ("gpt_oss", "--rslora")])


@EACH
def test_adapters_of_experts_are_loftq_on_each(name: str, scaling: str, mixture: Any, tmp_path: Path) -> None:
    from qlora_engine.inits import initialise

    base, out = mixture(name), tmp_path / "out"
    adapted_experts(base, out, scaling)
    report = {layer.name: layer for layer in RunReport.read(out).layers}
    weights, solved = dict(dense(base).named_parameters()), effective(out)
    assert len(solved) == 4
    for stack, values in solved.items():
        rank = 6 if "down_proj" in stack else 4
        for number in range(4):
            W = weights[stack][number].detach()
            W = W.T.contiguous() if name == "gpt_oss" else W
            best = initialise(W, method="loftq", spec=QuantSpec("nf3"), rank=rank, iters=5)
            found = values[number].T if name == "gpt_oss" else values[number]
            layer = report[f"{stack}.{number}"]
            assert layer.rank == rank
            error = ((W - found).norm() / W.norm()).item()
            assert error == pytest.approx(best.error, rel=1e-3)
            assert error == pytest.approx(layer.error, rel=1e-3)
            assert error < 0.95 * layer.error_plain
    # qlora-merge puts it into a dense model
    from tests.cli.test_merge import done as fine
    from tests.cli.test_merge import invoke as merge

    fine(merge(out, out / "loftq_init", tmp_path / "merged", "--dtype", "float32"))
    merged = dict(dense(tmp_path / "merged").named_parameters())
    for path, values in solved.items():
        torch.testing.assert_close(merged[path], values, rtol=1e-4, atol=1e-5)


@EACH
@since("0.20", "the factors of stacks lie otherwise")
def test_peft_reads_adapters_of_experts(name: str, scaling: str, mixture: Any, tmp_path: Path) -> None:
    """Onto the dense model: names, shapes and scaling are its own."""
    peft = pytest.importorskip("peft")
    base, out = mixture(name), tmp_path / "out"
    adapted_experts(base, out, scaling)
    weights, solved = dict(dense(base).named_parameters()), effective(out)
    theirs = peft.PeftModel.from_pretrained(dense(base), out / "loftq_init").merge_and_unload()
    model = qe.from_pretrained(out, dtype=torch.float32)
    assert len(stacks(model)) == 4
    for path, stack in stacks(model).items():
        delta = theirs.get_parameter(path) - weights[path]
        torch.testing.assert_close(stack.dense() + delta, solved[path], rtol=1e-4, atol=1e-5)


def test_experts_are_solved_in_the_metric_of_the_tokens_that_reach_them(
    mixture: Any, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = ("--bits", 3, "--rank", 4, "--calibration", texts, "--window", 64, "--method", "qera")
    given += ("--target-parameters", "down_proj", "--target-modules", "q_proj", "--verify", "--device", "cpu")
    done = invoke(mixture("qwen3_moe"), out, *given)
    assert done.code == 0, done.err
    adapted = [layer for layer in RunReport.read(out).layers if "experts.down_proj" in layer.name]
    assert len(adapted) == 8
    for layer in adapted:
        if layer.note:  # few tokens came to it
            assert "solved by loftq, not qera: " in layer.note
        else:
            assert layer.output_error is not None
            assert layer.output_error < (layer.output_error_plain or 0)
    assert not all(layer.note for layer in adapted)
    done = invoke(mixture("qwen3_moe"), tmp_path / "behind", *given, "--propagate")
    assert done.code == 0, done.err
    behind = [ly for ly in RunReport.read(tmp_path / "behind").layers if "experts.down_proj" in ly.name]
    assert all(layer.note == "solved by loftq, not qera: not calibrated" for layer in behind)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--target-parameters", "down_prj"),
            "is no stack of experts that is quantised (did you mean 'down_proj'?)",
        ),
        (("--target-parameters", "down_proj", "--no-quantize-experts"), "leave out --no-quantize-experts"),
        (
            ("--target-parameters", "down_proj", "--save-format", "bnb"),
            "--target-parameters with --save-format bnb",
        ),
        (("--target-parameters", "down_proj", "--rank-pattern", "down_proj=50"), "at most 32"),
    ],
)
def test_adapters_of_experts_that_cannot_be(
    options: tuple[str, ...], message: str, mixture: Any, tmp_path: Path
) -> None:
    assert message in invoke(mixture("qwen3_moe"), tmp_path / "out", "--rank", 4, *options).error()
    assert not list(tmp_path.iterdir())


def test_a_model_without_experts_says_so(make_checkpoint: Any, tmp_path: Path) -> None:
    done = invoke(make_checkpoint("llama"), tmp_path / "out", "--rank", 4, "--quantize-experts", "--dry-run")
    assert "this model has no stacked experts" in " ".join(done.out.split())
    done = invoke(make_checkpoint("llama"), tmp_path / "out", "--rank", 4, "--target-parameters", "down_proj")
    assert "'down_proj' is no stack of experts" in done.error()
