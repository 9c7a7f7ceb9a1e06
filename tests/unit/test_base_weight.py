"""What a base layer stands for: its dtype, its sizes, and bitsandbytes layers adopted or left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_engine.base_weight import (
    adopt,
    dense_module,
    dense_weight,
    device_and_dtype,
    in_out_features,
    is_conv1d,
    is_known,
    is_quantized,
    store_weight,
)
from quant import QuantSpec, quantize
from quant.linear import QuantEmbedding, QuantLinear


def quantised(dtype: torch.dtype = torch.bfloat16, compute: torch.dtype | None = None) -> QuantLinear:
    return QuantLinear.from_quantized(quantize(torch.randn(6, 64).to(dtype), QuantSpec()), None, compute)


def test_dtype_is_that_of_the_weight_unless_another_computes() -> None:
    assert device_and_dtype(quantised()) == (torch.device("cpu"), torch.bfloat16)
    assert device_and_dtype(quantised(compute=torch.float32))[1] == torch.float32
    assert device_and_dtype(nn.Linear(3, 4, dtype=torch.float16))[1] == torch.float16
    attention = nn.MultiheadAttention(8, 2, dtype=torch.float64)
    assert device_and_dtype(attention) == (torch.device("cpu"), torch.float64)
    assert device_and_dtype(nn.Identity()) == (None, None)
    other: Any = nn.Linear(3, 4)  # bitsandbytes' layers hold bytes and say what they compute in
    other.compute_dtype = torch.bfloat16
    assert device_and_dtype(other)[1] == torch.bfloat16


def test_sizes_of_every_kind() -> None:
    embedding = QuantEmbedding.from_quantized(quantize(torch.randn(6, 64), QuantSpec()))
    sizes: list[tuple[nn.Module, tuple[int | None, int | None]]] = [
        (nn.Linear(3, 4), (3, 4)),
        (quantised(), (64, 6)),
        (nn.Embedding(5, 7), (5, 7)),
        (embedding, (6, 64)),
        (Conv1D(4, 3), (3, 4)),
        (nn.Conv1d(2, 6, 3), (2, 6)),
        (nn.Conv2d(2, 6, 3), (2, 6)),
        (nn.Conv3d(2, 6, 3), (2, 6)),
        (nn.MultiheadAttention(8, 2), (8, 24)),
    ]
    for module, size in sizes:
        assert in_out_features(module) == size
        assert is_known(module)
        assert is_quantized(module) == isinstance(module, (QuantLinear, QuantEmbedding))
        assert is_conv1d(module) == isinstance(module, Conv1D)
    assert in_out_features(nn.Identity()) == (None, None)
    assert not is_known(nn.LayerNorm(3))


def test_a_stored_weight_is_quantised_by_the_layer_s_own_rule() -> None:
    layer, weight = quantised(torch.float32), torch.randn(6, 64)
    store_weight(layer, weight)
    assert torch.equal(dense_weight(layer), quantize(weight, QuantSpec()).dequantize())
    plain = nn.Linear(64, 6)
    store_weight(plain, weight)
    assert torch.equal(plain.weight, weight)


def test_dense_layer_of_a_quantised_one() -> None:
    layer = quantised(torch.float32).eval()
    layer.bias = nn.Parameter(torch.randn(6, dtype=torch.float64), requires_grad=False)
    dense: Any = dense_module(layer, dtype=torch.float16)
    assert type(dense) is nn.Linear
    assert dense.weight.dtype == dense.bias.dtype == torch.float16
    assert torch.equal(dense.weight, dense_weight(layer).half())
    assert not dense.bias.requires_grad
    assert not dense.training
    assert dense_module(layer.train()).training
    layer.bias = None
    assert dense_module(layer).bias is None
    with pytest.raises(TypeError, match="Linear is not quantised"):
        dense_module(nn.Linear(3, 4))


def _bnb_layer() -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 6, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(6, 64))
    return layer


def test_bitsandbytes_layers_are_adopted_once_they_are_quantised() -> None:
    fresh = _bnb_layer()
    assert adopt(fresh) is fresh
    layer = _bnb_layer().to("cpu")  # quantises
    want = dense_weight(layer)
    assert layer.weight.quant_state is not None
    for state_of_layer in (None, layer.weight.quant_state):  # which it learns in its first forward
        layer.quant_state = state_of_layer
        adopted = adopt(layer.eval())
        assert isinstance(adopted, QuantLinear)
        assert not adopted.training
        assert torch.equal(dense_weight(adopted), want)
    with pytest.raises(TypeError, match="the weight of a Linear4bit cannot be replaced in place"):
        store_weight(layer, want)


def test_the_name_alone_makes_no_bitsandbytes_layer() -> None:
    made = type("Linear4bit", (nn.Linear,), {"__module__": "elsewhere"})(3, 4)
    assert not is_quantized(made)
    assert adopt(made) is made
