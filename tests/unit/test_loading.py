"""What loftq-init writes, loaded as a model with our layers: every format, tied and untied, without
bitsandbytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_engine import PeftModel
from qlora_engine.errors import InputError
from qlora_engine.loading import from_pretrained
from quant.linear import QuantizedModule, QuantLinear

ROOT = Path(__file__).parents[2]


def init(model: Path, out: Path, *options: str) -> Path:
    """Run the real command's code in this process."""
    from qlora_engine.cli import loftq_init

    with pytest.raises(SystemExit) as ended:
        loftq_init.main([str(model), str(out), "--rank", "4", "--quiet", *options])
    assert ended.value.code in (0, None)
    return out


def layer_errors(model: Any, original: Any, factors: Path) -> float:
    """Largest relative difference of dequantised base + B A from the original weights, over the layers."""
    adapted = PeftModel.from_pretrained(model, str(factors))
    dense = adapted.merge_and_unload()
    weights = dict(original.named_parameters())
    return max(
        float(((p - weights[n]).norm() / weights[n].norm()).detach())
        for n, p in dense.named_parameters()
        if n.endswith("proj.weight")
    )


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        (("--bits", "4"), 0.1),
        (("--bits", "4", "--double-quant"), 0.1),
        (("--bits", "3"), 0.25),
        (("--bits", "8"), 0.02),
        (("--format", "uint2", "--scales", "mse"), 0.5),
        (("--bits", "4", "--save-format", "native", "--bits-pattern", "v_proj=3"), 0.25),
        (("--bits", "4", "--save-format", "dense"), 0.1),
    ],
)
def test_from_pretrained(
    options: tuple[str, ...], bound: float, make_checkpoint: Any, make_model: Any, tmp_path: Path
) -> None:
    out = init(make_checkpoint("llama"), tmp_path / "out", *options)
    model = from_pretrained(out, dtype=torch.float32)
    quantised = [m for m in model.modules() if isinstance(m, QuantizedModule)]
    assert bool(quantised) == ("dense" not in options)
    assert not any(p.is_meta for p in model.parameters())
    ids = torch.arange(12)[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert torch.isfinite(logits).all()
    if quantised:  # transformers' own writer keeps the layers, and they are read again
        model.save_pretrained(tmp_path / "again")
        with torch.no_grad():
            assert torch.equal(
                from_pretrained(tmp_path / "again", dtype=torch.float32)(input_ids=ids).logits, logits
            )
    original = make_model("llama")
    assert layer_errors(model, original, out / "loftq_init") < bound


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "bert", "t5"])
def test_from_pretrained_of_other_models(name: str, make_checkpoint: Any, tmp_path: Path) -> None:
    out = init(make_checkpoint(name), tmp_path / "out", "--bits", "3")
    model = from_pretrained(out)
    assert any(isinstance(m, QuantLinear) for m in model.modules())
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    adapted = PeftModel.from_pretrained(model, str(out / "loftq_init"))
    ids = torch.arange(3, 11)[None]
    extra = {"decoder_input_ids": ids} if name == "t5" else {}
    with torch.no_grad():
        assert torch.isfinite(adapted(input_ids=ids, **extra)[0]).all()


def test_transformers_reads_the_native_format(make_checkpoint: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import qlora_engine.transformers_quantizer

    out = init(make_checkpoint("llama"), tmp_path / "out", "--bits", "3")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        want = from_pretrained(out, dtype=torch.float32)(input_ids=ids).logits
        stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        assert torch.equal(stock(input_ids=ids).logits, want)
    assert qlora_engine.transformers_quantizer.NATIVE_METHOD == "qlora_engine"


def test_needs_no_bitsandbytes(make_checkpoint: Any, tmp_path: Path) -> None:
    out = init(make_checkpoint("llama"), tmp_path / "out", "--bits", "4")
    code = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "from qlora_engine.loading import from_pretrained\n"
        f"import torch; model = from_pretrained({str(out)!r})\n"
        "print(model(input_ids=torch.arange(5)[None]).logits.shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 5," in done.stdout


def test_refuses_what_it_cannot_read(make_checkpoint: Any, tmp_path: Path) -> None:
    out = init(make_checkpoint("llama"), tmp_path / "out", "--bits", "3")
    config = json.loads((out / "config.json").read_text())
    weights = load_file(out / "model.safetensors")

    def changed(settings: dict[str, Any]) -> None:
        (out / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))

    stored = config["quantization_config"]
    for settings, why in (
        ({"quant_method": "gptq"}, "quantised with 'gptq'"),
        ({**stored, "version": 99}, "version 99"),
        ({**stored, "spec": {"format": "nf5"}}, "unknown format"),
        ({**stored, "quantized_modules": ["model.nowhere"]}, "no such module"),
    ):
        changed(settings)
        with pytest.raises(InputError, match=why):
            from_pretrained(out)
    changed(stored)
    first = next(name for name in weights if name.endswith(".scales"))
    save_file({n: t for n, t in weights.items() if n != first}, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"cannot be read"):
        from_pretrained(out)
