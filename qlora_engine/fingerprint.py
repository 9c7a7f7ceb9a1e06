"""What a quantised base is, in one small JSON file: an adapter solved for one base is wrong on another.

PEFT warns about unknown keys in adapter_config.json, so this has a file of its own beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quant import QuantizedTensor, QuantSpec

from .files import read_json_object, write_json

FINGERPRINT_FILE = "quantization_fingerprint.json"
VERSION = 1
_ELEMENTS = 1 << 22  # of a dense weight hashed at once


def module_digest(q: QuantizedTensor) -> str:
    """SHA-256 (16 hex digits) of the shape and of every stored tensor of one weight.

    It does not depend on the layout on disk or the library that loaded it: bitsandbytes' and native files of
    one solution agree.
    """
    digest = hashlib.sha256(f"{q.spec.format} {q.spec.block_size} {tuple(q.shape)}".encode())
    for name in ("codes", "scales", "zeros", "nested_scales", "nested_offset"):
        tensor = getattr(q, name)
        if tensor is not None:
            flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
            digest.update(name.encode())
            digest.update(flat.numpy().data)
    return digest.hexdigest()[:16]


def dense_digest(weight: Tensor) -> str:
    """SHA-256 (16 hex digits) of the shape of a weight (out, in) and of the signs of its elements.

    Rounding to another floating dtype changes neither signs nor zeros (but for values that underflow), so a
    dequantised weight is known again in whatever dtype it is loaded. Another quantisation of the same weight
    differs in the signs of its smallest elements, and in which of them are zero.
    """
    digest = hashlib.sha256(f"dense {tuple(weight.shape)}".encode())
    for rows in weight.detach().split(max(1, _ELEMENTS // max(1, weight.shape[-1]))):
        for signs in (rows > 0, rows < 0):
            digest.update(np.packbits(signs.cpu().numpy()).data)
    return digest.hexdigest()[:16]


def most(reasons: list[str]) -> list[str]:
    """The first five: what is shown of many."""
    return reasons[:5]


@dataclass(frozen=True)
class Fingerprint:
    """The formats and contents of all quantised weights of a model.

    Attributes:
        specs: Module path -> how it is quantised.
        digests: Module path -> ``module_digest``; ``dense_digest`` where the base was saved dequantised.
        compute_dtype: In which the base is meant to compute, e.g. "bfloat16". Told, not compared: the same
            codes may be computed with in any dtype.
        dense: The base was saved dequantised.
    """

    specs: Mapping[str, QuantSpec]
    digests: Mapping[str, str]
    compute_dtype: str
    dense: bool = False

    @property
    def codes_sha256(self) -> str:
        """One hash of all digests with their module paths."""
        lines = "".join(f"{path}:{self.digests[path]}\n" for path in sorted(self.digests))
        return hashlib.sha256(lines.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        modules = {
            path: {**self.specs[path].to_dict(), "digest": self.digests[path]} for path in sorted(self.specs)
        }
        return {
            "version": VERSION,
            "codes_sha256": self.codes_sha256,
            "compute_dtype": self.compute_dtype,
            "stored": "dense" if self.dense else "packed",
            "modules": modules,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Fingerprint:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: another version, or not a fingerprint.
        """
        if values.get("version") != VERSION:
            raise ValueError(f"fingerprint version {values.get('version')!r}; this reads version {VERSION}")
        try:
            modules = {path: dict(facts) for path, facts in values["modules"].items()}
            digests = {path: str(facts.pop("digest")) for path, facts in modules.items()}
            specs = {path: QuantSpec.from_dict(facts) for path, facts in modules.items()}
            dense = values.get("stored") == "dense"
            return cls(specs, digests, str(values["compute_dtype"]), dense)
        except (KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"not a fingerprint of a quantised base: {error!r}") from error

    def write(self, folder: Path) -> None:
        """Write ``quantization_fingerprint.json`` into ``folder``, atomically."""
        write_json(folder / FINGERPRINT_FILE, self.to_dict())

    @classmethod
    def read(cls, folder: Path) -> Fingerprint | None:
        """The fingerprint in ``folder``; None where there is none.

        Raises:
            ValueError: the file is there and is not a fingerprint.
        """
        path = folder / FINGERPRINT_FILE
        return cls.from_dict(read_json_object(path)) if path.is_file() else None

    def differences(self, base: Fingerprint) -> list[str]:
        """Why an adapter made for this packed base does not belong to the packed ``base``: at most 5."""
        found = []
        for path in sorted({*self.specs, *base.specs}):
            made, given = self.specs.get(path), base.specs.get(path)
            if made is None or given is None:
                found.append(f"{path} is {'quantised' if made is None else 'dense'} in this base")
            elif made != given:
                found.append(
                    f"{path} is {given.format}/{given.block_size} here, was {made.format}/{made.block_size}"
                )
            elif self.digests[path] != base.digests[path]:
                found.append(f"{path} has other codes or scales")
        return most(found)
