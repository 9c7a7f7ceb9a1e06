"""Layers x options beside PEFT's: same config and weights give the same everything.

For each pair: the keys of the whole state dict, the adapter's file and its JSON, what trains, the forward,
every gradient, merged weights, the model after merge_and_unload, and the model with adapters disabled. All
kinds of layers together run by default, each kind alone with -m slow.

On purpose different:
- DoRA on a convolution in groups: PEFT divides by the norm of a kernel that its factors do not make; shown in
  test_dora_in_groups_divides_by_the_norm_of_what_it_adds, and such layers' forward is not compared;
- unmerging restores the very bits here; PEFT subtracts the delta (test_peft_merging.py, U3);
- a bitsandbytes base merges dense here, PEFT rounds the result again (test_peft_merging.py, U1 to U5);
- two adapters of which one has trainable tokens: PEFT fails to save the other (KeyError), ours saves both;
- no pickles: save_pretrained(safe_serialization=False) is refused.
Other parts have files of their own beside this one: initialisations, EVA, merging, mixing, hotswap, status.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import qlora_engine as ours
from tests.parity.releases import older_than, same_settings, since

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding"),
]
IDS = torch.arange(24).reshape(3, 8) % 20


class Net(nn.Module):
    """One layer of each kind, with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 16)
        self.lin = nn.Linear(16, 24)
        self.thin = nn.Linear(24, 24, bias=False)
        self.gpt = Conv1D(20, 24)
        self.conv1 = nn.Conv1d(8, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 4, 3, padding=1)
        self.group = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.head = nn.Linear(20, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.lin(self.emb(ids)))  # (batch, 8, 24)
        x = self.conv1(self.gpt(x + self.thin(x)))  # (batch, 6, 20)
        x = self.group(self.conv2(torch.tanh(x).unflatten(-1, (4, 5))))
        return self.head(x.flatten(-2))


KINDS = {
    "all": ["emb", "lin", "thin", "gpt", "conv1", "conv2"],
    "groups": ["group"],
    "embedding": ["emb"],
    "linear": ["lin"],
    "linear without bias": ["thin"],
    "gpt2's": ["gpt"],
    "conv1d": ["conv1"],
    "conv2d": ["conv2"],
}
BIASED = {"all with bias": ["lin", "gpt", "conv1", "conv2", "group"]}
ALWAYS = ("all", "all with bias")
OPTIONS: dict[str, dict[str, Any]] = {
    "scaling 1": {"lora_alpha": 4},
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora at scaling 1": {"use_dora": True, "lora_alpha": 4},
    "lora_bias": {"lora_bias": True},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["head"]},
    "rank_pattern": {"rank_pattern": {"lin": 2, "gpt|conv.": 6}, "alpha_pattern": {}},
    "alpha_pattern": {"alpha_pattern": {"lin": 2, "^(gpt|group)$": 20, "emb": 1}},
    "patterns, rslora": {"rank_pattern": {".*": 2}, "alpha_pattern": {"conv\\d": 3}, "use_rslora": True},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "trainable tokens": {"trainable_token_indices": {"emb": [1, 4, 19]}},
    "exclude": {"exclude_modules": "conv2"},
}


def allowed(kind: str, option: str) -> bool:
    if option == "lora_bias":  # no bias to merge into, and none for an embedding
        return kind not in ("embedding", "linear without bias", "all")
    if option == "trainable tokens":  # not of an embedding that is adapted
        return kind not in ("embedding", "all")
    if option == "exclude":
        return kind == "all"
    return option != "fan_in_fan_out" or kind in ("embedding", "linear", "gpt2's")


def cases() -> list[Any]:
    """All allowed pairs; slow where another pair covers the same layers together."""
    found = [("all with bias", option) for option in ("lora_bias", "trainable tokens")]
    found += [(kind, option) for kind in KINDS for option in OPTIONS if allowed(kind, option)]
    always = {
        ("groups", "plain"),
        ("groups", "dora"),
        ("linear", "fan_in_fan_out"),
        ("gpt2's", "fan_in_fan_out"),
    }
    return [
        pytest.param(
            kind,
            option,
            id=f"{kind}-{option}".replace(" ", "_"),
            marks=[] if kind in ALWAYS or (kind, option) in always else [pytest.mark.slow],
        )
        for kind, option in found
    ]


def kinds() -> list[Any]:
    return [pytest.param(k, marks=[] if k in (*ALWAYS, "groups") else [pytest.mark.slow]) for k in KINDS]


def pair(
    targets: Any, *options: dict[str, Any], base: nn.Module | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """(PEFT's, ours): the same base with adapters p, q ... of the same random weights."""
    torch.manual_seed(0)
    base = Net().to(dtype) if base is None else base
    models = []
    for library in (peft, ours):
        configs = [
            library.LoraConfig(
                **{"r": 4, "lora_alpha": 6, "target_modules": copy.deepcopy(targets), **copy.deepcopy(o)}
            )
            for o in options
        ]
        model = library.get_peft_model(copy.deepcopy(base), configs[0], adapter_name="p")
        for name, config in zip("qst", configs[1:]):
            model.add_adapter(name, config)
        models.append(model)
    theirs, mine = models
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens")):
                # magnitudes stay near the norms that they start from, factors are no longer zero
                noise = torch.randn(parameter.shape).to(parameter)
                parameter.add_(noise, alpha=0.05 if "magnitude" in name else 0.2)
    missing, unexpected = mine.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing
    assert not unexpected
    return theirs, mine


def run(model: Any, x: Tensor = IDS, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Output, and gradients of everything that trains by name."""
    model.zero_grad()
    y = model(x, **kwargs)
    (y.float().square().sum() + y.float().sum()).backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_same_run(theirs: Any, mine: Any, tolerance: float = 1e-4) -> None:
    (y, wanted), (z, got) = run(theirs), run(mine)
    torch.testing.assert_close(z, y, rtol=tolerance, atol=tolerance)
    assert set(got) == set(wanted)
    assert any(g is not None for g in wanted.values())
    for name, gradient in wanted.items():
        ours_ = got[name]
        if gradient is None:
            assert ours_ is None, name
        else:
            scale = float(gradient.abs().max())
            torch.testing.assert_close(ours_, gradient, rtol=tolerance, atol=tolerance * scale, msg=name)


def as_written(folder: Path) -> dict[str, Any]:
    """adapter_config.json with its sets in order."""
    values = json.loads((folder / "adapter_config.json").read_text())
    return {k: sorted(v) if isinstance(v, list) else v for k, v in values.items()}


def assert_same_files(theirs: Any, mine: Any, folder: Path) -> None:
    from safetensors.torch import load_file

    theirs.save_pretrained(folder / "theirs")
    mine.save_pretrained(folder / "ours")
    for name in theirs.peft_config:
        a, b = folder / "theirs" / name, folder / "ours" / name
        assert same_settings(as_written(b), as_written(a))
        wanted = load_file(a / "adapter_model.safetensors")
        got = load_file(b / "adapter_model.safetensors")
        assert set(got) == set(wanted)
        for key, tensor in wanted.items():
            assert torch.equal(got[key], tensor), key
            assert got[key].dtype == tensor.dtype, key


@pytest.mark.parametrize(("kind", "option"), cases())
def test_everything_is_the_same(kind: str, option: str, tmp_path: Path) -> None:
    if option == "bias lora_only" and older_than("0.21"):
        pytest.skip("PEFT before 0.21 saves no bias then")
    theirs, mine = pair({**KINDS, **BIASED}[kind], OPTIONS[option])
    assert list(mine.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in mine.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert mine.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert_same_files(theirs, mine, tmp_path)
    grouped = isinstance(getattr(mine.get_base_model().group, "base_layer", None), nn.Conv2d)
    if not (grouped and OPTIONS[option].get("use_dora")):
        assert_same_run(theirs.train(), mine.train())
        assert_same_run(theirs.eval(), mine.eval())
    with theirs.disable_adapter(), mine.disable_adapter():
        torch.testing.assert_close(mine(IDS), theirs(IDS), rtol=1e-5, atol=1e-5)
    if grouped:
        for model in (theirs, mine):
            with pytest.raises(NotImplementedError, match="Merging is not supported for _ConvNd layers with"):
                model.merge_adapter()
        return
    theirs.merge_adapter()
    mine.merge_adapter()
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], weight, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(mine(IDS), theirs(IDS), rtol=1e-4, atol=1e-4)
    a, b = theirs.merge_and_unload(), mine.merge_and_unload()
    assert list(b.state_dict()) == list(a.state_dict())
    for name, weight in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[name], weight, rtol=1e-4, atol=1e-5, msg=name)
    assert [type(m) for m in b.modules()] == [type(m) for m in a.modules()]


@since("0.19", "the norm is computed elsewhere")
def test_dora_in_groups_divides_by_the_norm_of_what_it_adds() -> None:
    """The branch's kernel, found by convolving unit impulses, and the base's: PEFT's norm is of neither."""
    theirs, mine = pair(["group"], OPTIONS["dora"])
    layers = [model.get_base_model().group for model in (theirs, mine)]
    layer: Any = layers[1]
    base, A, B, s = layer.base_layer, layer.lora_A["p"], layer.lora_B["p"], layer.scaling["p"]
    # A centred impulse in every input channel gives the flipped kernel: (in, out, 3, 3).
    impulses = torch.zeros(4, 4, 5, 5)
    impulses[range(4), range(4), 2, 2] = 1
    with torch.no_grad():
        whole = base(impulses) - base.bias.view(1, -1, 1, 1) + s * B(A(impulses))
        expected = whole.transpose(0, 1).flatten(1).norm(dim=1)
        torch.testing.assert_close(layer.weight_norm("p").flatten(), expected, rtol=1e-4, atol=1e-5)
        holder = layers[0].lora_magnitude_vector["p"]
        delta = holder.get_lora_weight(layers[0].lora_A["p"], layers[0].lora_B["p"], adapter_name="p")
        weight = layers[0].base_layer.weight
        norm = holder.get_weight_norm(weight, delta.reshape(weight.shape), s, adapter_name="p")
    assert (norm.flatten() / expected - 1).abs().max() > 0.01


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_same_seed_same_start(kind: str, init: Any) -> None:
    models = []
    for library in (peft, ours):
        torch.manual_seed(1)
        base = Net()
        torch.manual_seed(2)
        config = library.LoraConfig(r=4, target_modules=list(KINDS[kind]), init_lora_weights=init)
        models.append(library.get_peft_model(base, config))
    theirs, mine = models
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(mine.state_dict()[name], tensor), name


@pytest.mark.parametrize("second", ["plain", "rslora", "dora", "rank_pattern", "trainable tokens"])
def test_several_adapters(second: str, tmp_path: Path) -> None:
    """One after the other, both at once, merged in either order, and one deleted."""
    kind = "conv2d" if second == "trainable tokens" else "all"
    if second == "dora" and older_than("0.21"):
        pytest.skip("PEFT before 0.21: the second DoRA adapter is merged by another norm")
    theirs, mine = pair(KINDS[kind], {}, {**OPTIONS[second], "r": 3})
    if second == "trainable tokens":
        with pytest.raises(KeyError):
            theirs.save_pretrained(tmp_path / "theirs")
        mine.save_pretrained(tmp_path / "ours")
        again = ours.PeftModel.from_pretrained(Net(), tmp_path / "ours" / "p", adapter_name="p")
        again.load_adapter(tmp_path / "ours" / "q", "q")
        loaded = again.state_dict()
        for name, tensor in mine.state_dict().items():
            if "lora_" in name or "trainable_tokens_delta" in name:
                assert torch.equal(loaded[name], tensor), name
    elif not older_than("0.20"):  # PEFT before it saves adapter "q" of the layer "gpt" with "p"
        assert_same_files(theirs, mine, tmp_path)
    for active in ("q", "p"):
        theirs.set_adapter(active)
        mine.set_adapter(active)
        assert_same_run(theirs, mine)
    for both in (["p", "q"], ["q", "p"]):
        theirs.base_model.set_adapter(both)
        mine.base_model.set_adapter(both)
        assert mine.active_adapters == theirs.active_adapters == both
        assert_same_run(theirs, mine)
    theirs.merge_adapter(["q"])
    mine.merge_adapter(["q"])
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], weight, rtol=1e-4, atol=1e-5, msg=name)
    theirs.unmerge_adapter()
    mine.unmerge_adapter()
    theirs.set_adapter("p")
    mine.set_adapter("p")
    theirs.delete_adapter("q")
    mine.delete_adapter("q")
    assert list(mine.state_dict()) == list(theirs.state_dict())
    assert_same_run(theirs, mine)


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("option", ["plain", "rslora", "modules_to_save", "trainable tokens"])
def test_mixed_batches(kind: str, option: str) -> None:
    if not allowed(kind, option):
        kind = "linear"
    second = {**OPTIONS[option], "r": 2}
    if option == "trainable tokens":
        second["trainable_token_indices"] = {"emb": [2, 5]}
    theirs, mine = pair(KINDS[kind], OPTIONS[option], second)
    theirs.eval(), mine.eval()
    for names in (["p", "q", "__base__"], ["q", "q", "p"], ["__base__"] * 3):
        wanted, got = (model(IDS, adapter_names=names) for model in (theirs, mine))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    for names in (["p"], ["p", "nobody", "q"]):
        errors = []
        for model in (theirs, mine):
            with pytest.raises(ValueError) as caught:
                model(IDS, adapter_names=names)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]


@pytest.mark.parametrize("rate", [0.3, 0.9])
@pytest.mark.parametrize("option", ["plain", "dora"])
def test_dropout_draws_the_same(rate: float, option: str) -> None:
    theirs, mine = pair(["lin", "gpt", "emb"], {**OPTIONS[option], "lora_dropout": rate})
    outputs = []
    for model in (theirs.train(), mine.train()):
        torch.manual_seed(3)
        outputs.append(model(IDS))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mine.eval()(IDS), theirs.eval()(IDS), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs[1], mine(IDS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(dtype: torch.dtype, autocast: bool) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).to(dtype)
    models = []
    for library in (peft, ours):
        config = library.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
        models.append(library.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=autocast))
    theirs, mine = models
    mine.load_state_dict(theirs.state_dict())
    dtypes = [{n: p.dtype for n, p in model.named_parameters()} for model in models]
    assert dtypes[0] == dtypes[1]
    x = torch.randn(5, 16, dtype=dtype)
    (y, wanted), (z, got) = run(theirs, x), run(mine, x)
    assert z.dtype == y.dtype
    torch.testing.assert_close(z, y, rtol=2e-2, atol=2e-2)
    for name, gradient in wanted.items():
        assert gradient is not None
        torch.testing.assert_close(got[name], gradient, rtol=3e-2, atol=3e-2 * float(gradient.abs().max()))


class FourBit(nn.Module):
    """bitsandbytes' layers as transformers leaves them."""

    is_loaded_in_4bit = True

    def __init__(self, double: bool) -> None:
        super().__init__()
        import bitsandbytes as bnb

        for name, shape in (("first", (64, 128)), ("second", (128, 64))):
            layer = bnb.nn.Linear4bit(
                *shape, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=double
            )
            layer.load_state_dict(nn.Linear(*shape).state_dict())
            setattr(self, name, layer.to("cpu"))
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.relu(self.first(x))))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("option", ["plain", "rslora", "dora", "rank_pattern", "modules_to_save", "bias all"])
def test_on_a_bitsandbytes_base(option: str, double: bool, tmp_path: Path) -> None:
    """Forward, gradients, what trains, adapter file and JSON; here on the same storage, adopted."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = FourBit(double)
    options = {**OPTIONS[option]}
    models = []
    for library in (peft, ours):
        config = library.LoraConfig(r=4, lora_alpha=6, target_modules=["first", "second"], **options)
        models.append(library.get_peft_model(copy.deepcopy(base), config, adapter_name="p"))
    theirs, mine = models
    trained = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    own = dict(mine.named_parameters())
    assert set(trained) == {n for n, p in own.items() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.add_(torch.randn(parameter.shape), alpha=0.02 if "magnitude" in name else 0.1)
            own[name].copy_(parameter)
    x = torch.randn(6, 64)
    (y, wanted), (z, got) = run(theirs, x), run(mine, x)
    torch.testing.assert_close(z, y, rtol=1e-3, atol=1e-3)
    for name, gradient in wanted.items():
        assert gradient is not None
        torch.testing.assert_close(got[name], gradient, rtol=1e-2, atol=1e-3 * float(gradient.abs().max()))
    assert_same_files(theirs, mine, tmp_path)
