"""How many decoder layers have to be computed twice so that a training step fits into memory.

Checkpointing a layer keeps its input alone and computes the rest again in backward: a third more time for all
layers. So as few layers as needed are checkpointed, decided before training from sizes measured on the
model itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_engine.errors import InputError
from quant.experts import QuantExperts
from quant.linear import QuantizedModule

from .loss import in_one_kernel, loss_bytes
from .packed_rows import (
    attends_by_beginnings,
    attention_dtype,
    mask_bytes,
    packed_mask,
    row_beginnings,
    takes_packed_mask,
)

# What a layer keeps is proportional to tokens; measured on so many, which is no head's size, so that a mask
# is known by its shape.
_PROBE_TOKENS = 124
LOSS_NAMES = {"liger": "liger-kernel", "chunked": "in chunks", "": "full logits"}
MARGIN = 0.92  # of the memory: the rest is for fragmentation and library workspaces


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a training step, by what they are for.

    Attributes:
        layers: Decoder layers.
        recomputed: How many of them are checkpointed.
        weights: Parameters and buffers of the frozen model.
        adapter: Trained parameters, their gradients and the optimizer's state.
        activations: What the layers keep for backward, recomputed ones their input only, and one layer's
            worth while it is computed again.
        loss: Logits of one chunk, the labelled hidden states and their gradient, see ``loss.loss_bytes``.
        workspace: The largest weight, decoded; of a sharded model also two layers put together.
        per_layer: Kept by one layer that is not recomputed.
        available: The budget; 0 where there is none.
        loss_function: What computes the loss: "liger", "chunked", or "" for the model itself.
        mask: What keeps packed rows apart, for all layers together.
    """

    layers: int
    recomputed: int
    weights: int
    adapter: int
    activations: int
    loss: int
    workspace: int
    per_layer: int
    available: int
    loss_function: str
    mask: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapter + self.activations + self.mask + self.loss + self.workspace

    def lines(self) -> list[str]:
        """For people."""
        rows = [
            ("model", self.weights),
            ("adapter, gradients, optimizer", self.adapter),
            (f"activations, {self.recomputed} of {self.layers} layers recomputed", self.activations),
            (f"loss ({LOSS_NAMES[self.loss_function]})", self.loss),
            ("decoded weight", self.workspace),
            ("in all", self.total),
        ]
        if self.mask:
            rows.insert(3, ("attention masks of packed rows", self.mask))
        if self.available:
            rows.append(("available", self.available))
        return [f"{name:48s} {size / 2**30:8.2f} GiB" for name, size in rows]

    def to_json(self) -> dict[str, Any]:
        """Every figure by name."""
        return asdict(self) | {"total": self.total}


def unwrapped(model: Any) -> Any:
    """The transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; another tensor itself."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers can checkpoint, in order; empty where the model has none."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "gradient_checkpointing") and _is_layer(module)
    ]


def _is_layer(module: nn.Module) -> bool:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, GradientCheckpointingLayer)


def available_memory(device: torch.device) -> int:
    """Bytes that a step may take on a GPU, what the model takes already included; 0 on a CPU: no budget."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return int((free + torch.cuda.memory_reserved(device)) * MARGIN)


def parse_recompute(text: str | int) -> str | int:
    """``--recompute``'s value: a count of layers as an int, the words as they are.

    Raises:
        InputError: neither a count nor one of the words.
    """
    if text in ("auto", "none", "full"):
        return text
    try:
        count = int(text)
    except ValueError:
        count = -1
    if count < 0:
        raise InputError(f"recompute={text!r}; allowed: auto, none, full, or a count of layers")
    return count


def plan(
    model: nn.Module,
    *,
    batch_size: int,
    length: int,
    recompute: str | int = "auto",
    available: int | None = None,
    optimizer_bytes: int = 8,
    inputs_on_host: bool = False,
    loss_function: str = "chunked",
    packed: torch.dtype | None = None,
) -> MemoryPlan:
    """Measure the model and choose.

    Args:
        model: On its device, adapters attached.
        batch_size: Sequences of a step.
        length: Tokens of a sequence.
        recompute: "none", "full", a number of layers, or "auto": as few as ``available`` allows.
        available: Bytes; None: the device's.
        optimizer_bytes: Of optimizer state a trained parameter; 8: AdamW in float32.
        inputs_on_host: Recomputed layers keep their input in the host's memory.
        loss_function: What ``loss.use_chunked_loss`` gave.
        packed: The dtype of the attention, where rows are packed; None: they are not.

    Raises:
        InputError: recompute is none of these, there are fewer layers, or "auto" finds that nothing fits.
    """
    layers = decoder_layers(model)
    device = next(model.parameters()).device
    available = available_memory(device) if available is None else available
    tokens = batch_size * length
    by_mask = packed is not None and bool(loss_function)
    by_beginnings = by_mask and attends_by_beginnings(unwrapped(model))
    one_mask = by_mask and not by_beginnings and takes_packed_mask(unwrapped(model))
    probe = _probe(model, min(length, _PROBE_TOKENS), packed is not None, by_beginnings, one_mask)
    kept, passed_on = _measure(model, layers, probe) if layers else (0.0, 0.0)
    frozen = sum(local(t).nbytes for t in [*model.parameters(), *model.buffers()] if not t.requires_grad)
    trained = [local(p) for p in model.parameters() if p.requires_grad]
    adapter = sum(2 * p.nbytes + optimizer_bytes * p.numel() for p in trained)
    text = unwrapped(model).config.get_text_config()
    vocabulary, hidden = getattr(text, "vocab_size", 0), getattr(text, "hidden_size", 0)
    head = unwrapped(model).get_output_embeddings()
    dtype = getattr(getattr(head, "weight", None), "dtype", torch.float32)
    loss = loss_bytes(
        loss_function,
        tokens=tokens,
        vocabulary=vocabulary,
        hidden=hidden,
        element_size=dtype.itemsize if dtype.is_floating_point else 4,
        in_place=in_one_kernel(device, dtype),
    )
    decoded = [m.shape.numel() * 4 for m in model.modules() if isinstance(m, QuantizedModule)]
    if getattr(text, "_experts_implementation", None) == "grouped_mm":  # all experts of a layer at once
        decoded += [m.numel() * 4 for m in model.modules() if isinstance(m, QuantExperts)]
    workspace = max(decoded, default=0) // (1 if device.type == "cpu" else 2)
    if is_sharded(model):  # one layer computes while the next one is gathered
        workspace += 2 * max(
            (sum(p.numel() * p.element_size() for p in ly.parameters()) for ly in layers), default=0
        )
    passed_on = 0.0 if inputs_on_host else passed_on
    mask = 0 if packed is None or by_beginnings else mask_bytes(batch_size, length, packed)

    def with_recomputed(count: int) -> MemoryPlan:
        activations = tokens * (kept * (len(layers) - count) + passed_on * count + kept * (count > 0))
        return MemoryPlan(
            layers=len(layers),
            recomputed=count,
            weights=frozen,
            adapter=adapter,
            activations=int(activations),
            # else each layer makes one and keeps it, one that is computed again for that long
            mask=mask if one_mask else mask * (len(layers) - count + (count > 0)),
            loss=loss,
            workspace=workspace,
            per_layer=int(kept * tokens),
            available=available,
            loss_function=loss_function,
        )

    recompute = parse_recompute(recompute)
    if recompute == "none":
        return with_recomputed(0)
    if recompute == "full":
        return with_recomputed(len(layers))
    if recompute != "auto":
        assert isinstance(recompute, int)
        if recompute > len(layers):
            raise InputError(
                f"recompute={recompute}; the model has {len(layers)} layers: allowed: 0 to {len(layers)}, "
                "none, full, auto"
            )
        return with_recomputed(recompute)
    if not available:
        return with_recomputed(0)
    for count in range(len(layers) + 1):
        if with_recomputed(count).total <= available:
            return with_recomputed(count)
    least = with_recomputed(len(layers))
    raise InputError(
        f"a step needs {_size(least.total)} with every layer recomputed, {_size(available)} are there; lower "
        "--batch-size or --max-length, or use fewer --bits"
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.2f} MiB"


def apply(model: nn.Module, recomputed: int) -> None:
    """Checkpoint the last ``recomputed`` decoder layers, and no other.

    The last ones: backward reaches them first, while the others' activations are all still there, and
    frees theirs.
    """
    base = unwrapped(model)
    layers = decoder_layers(model)
    if recomputed:
        if hasattr(base, "activation_checkpointing_enable"):  # transformers 5.20 and newer warn of the other
            base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index >= len(layers) - recomputed  # type: ignore[assignment]


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters are spread over the processes."""
    return any(local(parameter) is not parameter for parameter in model.parameters())


def _probe(
    model: nn.Module, tokens: int, packed: bool, by_beginnings: bool, one_mask: bool
) -> dict[str, Tensor]:
    """A sequence of so many tokens, as the layers get them: what attention keeps depends on its mask."""
    device = next(model.parameters()).device
    inputs = {"input_ids": torch.zeros((1, tokens), dtype=torch.long, device=device)}
    if not packed:
        return inputs
    positions = (torch.arange(tokens) % max(1, tokens // 2))[None]  # two rows
    if by_beginnings:
        inputs["attention_mask"] = row_beginnings(positions).to(device)
    elif one_mask:
        inputs["attention_mask"] = packed_mask(positions, attention_dtype(unwrapped(model))).to(device)
    return inputs | {"position_ids": positions.to(device)}


def _measure(model: nn.Module, layers: list[nn.Module], probe: dict[str, Tensor]) -> tuple[float, float]:
    """Bytes a token that a decoder layer keeps for backward, and that its input takes; means over the
    layers."""
    own = {local(t).untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    own |= {tensor.untyped_storage().data_ptr() for tensor in probe.values()}  # there once, not in each layer
    tokens = probe["input_ids"].shape[1]
    sizes: list[int] = []
    inputs: list[int] = []
    stack: list[ExitStack] = []

    @contextmanager
    def counting() -> Iterator[None]:
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            # masks are counted apart: they are proportional to the square of tokens
            a_mask = tensor.shape[-2:] == (tokens, tokens)
            # gathered codes are not kept
            if storage.data_ptr() not in own and tensor.dtype != torch.uint8 and not a_mask:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # an output that is saved as it is would hold itself, and the whole graph

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
        sizes.append(sum(seen.values()))

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = args[0] if args else kwargs["hidden_states"]
        inputs.append(first.nbytes)
        stack.append(ExitStack())
        stack[-1].enter_context(counting())

    def leave(*_: Any) -> None:
        stack.pop().close()

    device = next(model.parameters()).device
    base = unwrapped(model)
    backbone = getattr(base, getattr(base, "base_model_prefix", ""), base)
    embedding = base.get_input_embeddings()
    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(leave) for layer in layers]
    training = model.training
    model.train()
    apply(model, 0)
    # as in a run: the first layer's input needs no gradient in itself, the following ones' do
    handles.append(
        embedding.register_forward_hook(lambda *a: a[2].requires_grad_() if a[2].is_leaf else a[2])
    )
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            if is_sharded(model):  # the whole step, so that FSDP's own bookkeeping ends where it began
                base(**probe, labels=probe["input_ids"], use_cache=False).loss.backward()
                model.zero_grad(set_to_none=True)
            else:
                backbone(**probe, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return sum(sizes) / len(sizes) / tokens, sum(inputs) / len(inputs) / tokens
