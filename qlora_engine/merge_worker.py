"""The arithmetic of ``qlora-merge``: one weight of a base with an adapter in it, and what that changed."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.tensor import QuantizedTensor, quantize

from .disk_adapter import ModulePart
from .errors import InputError
from .expert_layout import Slab
from .expert_merge import StackFactors, expert_entry
from .merge_job import Job
from .merge_plan import MergePlan
from .requantize import measure
from .safetensors_io import TORCH_DTYPES, DenseTensor
from .serialise import round_to


@dataclass(frozen=True)
class MergedLayer:
    """What merging did to one weight; norms are Frobenius norms.

    Attributes:
        name: Of the dense tensor.
        shape: Of the weight.
        delta: ``||D|| / ||W||`` of what the adapter added.
        format: Of the result: a dtype, or a format and block size.
        error: Of a requantised result, ``||W' - (W + D)|| / ||W + D||``; None for a dense one.
        survived: Of a requantised result, ``<W' - W, D> / <D, D>``, the share of the delta that is in it.
        seconds: Time to compute.
    """

    name: str
    shape: tuple[int, ...]
    delta: float
    format: str
    error: float | None = None
    survived: float | None = None
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """JSON-able fields."""
        return dataclasses.asdict(self) | {"shape": list(self.shape)}


Progress = Callable[[MergedLayer, bool], None]


def add_part(weight: Tensor, part: ModulePart, *, transposed: bool) -> Tensor:
    """``weight`` (float32, as on the disk; it is used up) with the adapter in it.

    Args:
        weight: (out, in, ...), or (in, out) where ``transposed``.
        part: What to add; its tensors are read here.
        transposed: The weight is a Conv1D's or an embedding's.
    """
    if part.A is not None and part.B is not None:
        A, B = part.A.read().float().flatten(1), part.B.read().float().flatten(1)
        if transposed:
            weight.addmm_(A.t(), B.t(), alpha=part.scaling)
        else:
            weight.flatten(1).addmm_(B, A, alpha=part.scaling)
        if part.magnitude is not None:
            rows = weight.t() if transposed else weight.flatten(1)  # (out, in), a view
            norm = torch.linalg.vector_norm(rows, dim=1)
            rows.mul_((part.magnitude.read().float().reshape(-1) / norm).unsqueeze(1))
    if part.tokens is not None:
        weight[torch.tensor(part.token_indices, dtype=torch.long)] = part.tokens.read().float()
    return weight


def factor_norm(part: ModulePart) -> float:
    """``||scaling B A||``, from the small Gram matrices of the factors."""
    if part.A is None or part.B is None:
        return 0.0
    A, B = part.A.read().double().flatten(1), part.B.read().double().flatten(1)
    return part.scaling * math.sqrt(max(((B.t() @ B) * (A @ A.t())).sum().item(), 0.0))


class Worker:
    """Computes jobs; ``records`` is what it merged.

    Args:
        plan: What the jobs are of.
        progress: Called with every record, and whether it is of an earlier run.
    """

    def __init__(self, plan: MergePlan, progress: Progress | None) -> None:
        self.plan, self.progress = plan, progress
        self.records: list[MergedLayer] = []
        self._factors = StackFactors()

    def pieces(self, job: Job) -> Iterator[Tensor]:
        """The result of a "merge" or "dequantise" job, in its dtype; of a stack of experts one by one."""
        if job.slab is None:
            yield self.dense(job)
        else:
            yield from self._experts(job)

    def _experts(self, job: Job) -> Iterator[Tensor]:
        """The experts of a job, or the one that the tensor is."""
        began = time.perf_counter()
        part, slab = job.part, job.slab
        assert slab is not None
        size = added = 0.0
        for expert, weight in _stored_experts(job, slab):
            if part is None:
                yield round_to(weight, TORCH_DTYPES[job.dtype], job.name)
                continue
            left, right = self._factors.of(part, slab, expert)
            size += torch.linalg.vector_norm(weight, dtype=torch.float64).item() ** 2
            gram = (left.double().t() @ left.double()) * (right.double() @ right.double().t())
            added += max(gram.sum().item(), 0.0)
            weight.addmm_(left, right, alpha=part.scaling)
            self._check(job, weight)
            yield round_to(weight, TORCH_DTYPES[job.dtype], job.name)
        if part is None:
            return
        delta = _ratio(abs(part.scaling) * math.sqrt(added), math.sqrt(size))
        self.note(MergedLayer(job.name, job.shape, delta, job.dtype, seconds=time.perf_counter() - began))

    def dense(self, job: Job) -> Tensor:
        """The result of a "merge" or "dequantise" job of an ordinary weight, in its dtype."""
        began = time.perf_counter()
        assert job.stored is not None
        before = job.stored.read()
        delta = 0.0
        after = before
        if job.bias and job.part is not None and job.part.bias is not None:
            added = job.part.scaling * job.part.bias.read().float()
            delta = _ratio(added.norm().item(), before.norm().item())
            after = before + added
        elif job.part is not None:
            size = before.norm().item()
            exact = job.part.magnitude is not None or job.part.tokens is not None
            copy = before.clone() if exact else None  # a plain product's norm needs no copy
            after = add_part(before, job.part, transposed=_is_transposed(job))
            delta = _ratio((after - copy).norm().item() if copy is not None else factor_norm(job.part), size)
        self._check(job, after)
        result = round_to(after, TORCH_DTYPES[job.dtype], job.name)
        if job.part is not None:
            self.note(MergedLayer(job.name, job.shape, delta, job.dtype, seconds=time.perf_counter() - began))
        return result

    def quantised(self, job: Job) -> tuple[QuantizedTensor, MergedLayer | None]:
        """The result of a "quantise" job."""
        began = time.perf_counter()
        assert job.stored is not None
        assert job.spec is not None
        dtype = getattr(torch, self.plan.dtype)
        if job.keep_codes:
            return dataclasses.replace(job.stored.quantized(), dtype=dtype), None
        assert job.part is not None
        before = job.stored.read()
        if job.slab is not None:
            assert job.slab.expert is not None
            left, right = self._factors.of(job.part, job.slab, job.slab.expert)
            after = torch.addmm(before, left, right, alpha=job.part.scaling)
        else:
            after = add_part(before.clone(), job.part, transposed=_is_transposed(job))
        self._check(job, after)
        if job.stored.module is not None and job.stored.module.kind == "conv1d":
            before, after = before.t().contiguous(), after.t().contiguous()
        q = quantize(after, job.spec, name=job.name)
        facts = measure(job.name, job.spec, 0, before, after, q.dequantize(torch.float32))
        record = MergedLayer(
            name=job.name,
            shape=job.shape,
            delta=facts.delta,
            format=f"{job.spec.format}/{job.spec.block_size}{'+' if job.spec.double_quant else ''}",
            error=facts.error,
            survived=facts.survived,
            seconds=time.perf_counter() - began,
        )
        return dataclasses.replace(q, dtype=dtype), record

    def _check(self, job: Job, tensor: Tensor) -> None:
        if self.plan.options.safe and not torch.isfinite(tensor).all():
            raise InputError(f"'{job.name}' is not finite after merging; the adapter seems to be broken")

    def note(self, record: MergedLayer, kept: bool = False) -> None:
        """Keep a record and tell of it."""
        self.records.append(record)
        if self.progress is not None:
            self.progress(record, kept)


def _stored_experts(job: Job, slab: Slab) -> Iterator[tuple[int, Tensor]]:
    """Number and matrix of each expert of a job, float32, as they lie on disk or as the model has them."""
    if job.experts:
        for expert, stored in enumerate(job.experts):
            yield expert, stored.read()
        return
    assert job.stored is not None
    entry = job.stored.entries[job.stored.name]
    if slab.expert is not None:
        yield slab.expert, entry.read().float()
        return
    for expert in range(entry.shape[0]):
        yield expert, expert_entry(entry, expert).read().float()


def _is_transposed(job: Job) -> bool:
    if job.part is not None and job.part.as_stored:
        return False
    module = job.stored.module if job.stored is not None else None
    embedding = job.part is not None and job.part.embedding
    return embedding or (module is not None and module.kind == "conv1d")


def _ratio(value: float, by: float) -> float:
    return value / by if by > 0 else 0.0


@dataclass(frozen=True)
class LazyTensor:
    """A dense tensor that is computed when it is written."""

    job: Job
    worker: Worker

    @property
    def name(self) -> str:
        """Name in the file."""
        return self.job.name

    @property
    def dtype(self) -> str:
        """safetensors' name."""
        return self.job.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        return self.job.shape

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.job.nbytes

    def chunks(self) -> Iterator[memoryview]:
        """Compute it and give its bytes."""
        for piece in self.worker.pieces(self.job):
            yield from DenseTensor(self.job.name, piece).chunks()
