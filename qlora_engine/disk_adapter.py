"""An adapter folder as merging needs it: what it adds to which module, its tensors still on the disk."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .adapter_io import ADAPTER_WEIGHTS_FILE, KEY_PREFIX
from .checkpoint import SIDE_FILES, is_inside
from .config import LoraConfig
from .errors import InputError
from .files import read_json_object
from .fingerprint import FINGERPRINT_FILE
from .peft_layout import check_stack, release_of_stacks
from .safetensors_io import TensorEntry, read_header
from .targets import pattern_value

CONFIG_FILE = "adapter_config.json"
PICKLED_WEIGHTS = "adapter_model.bin"
# Initialisations that change the base: what is on the disk belongs to a base that is not the original.
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga")
# Ending of a key -> what it is to its module.
_PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "bias",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".token_adapter.trainable_tokens_delta": "tokens",
}


@dataclass(frozen=True)
class ModulePart:
    """What the adapter does to one module, or to one bare Parameter of it.

    Attributes:
        path: Of the module in the model.
        A, B: Factors, ``B @ A`` flattened over a kernel; None where only token rows are trained. Those of a
            stack of experts are A (rank * experts, in) and B (out, rank * experts), as PEFT keeps them.
        bias: Of lora_B.
        magnitude: DoRA's.
        scaling: Of the product.
        tokens: Rows that replace those of ``token_indices``.
        embedding: The factors are an embedding's.
        parameter: Name in the module of what they belong to.
        as_stored: They came by ``target_parameters``: ``B @ A`` has the shape that the Parameter has.
        experts: How many matrices the Parameter stacks; 0 where it is none.
        in_out: Of a stack: its matrices are (in, out), the transposed products.
    """

    path: str
    A: TensorEntry | None = None
    B: TensorEntry | None = None
    bias: TensorEntry | None = None
    magnitude: TensorEntry | None = None
    scaling: float = 1.0
    tokens: TensorEntry | None = None
    token_indices: tuple[int, ...] = ()
    embedding: bool = False
    parameter: str = "weight"
    as_stored: bool = False
    experts: int = 0
    in_out: bool = False

    @property
    def rank(self) -> int:
        """Of the factors, 0 without."""
        return 0 if self.A is None else self.A.shape[0] // max(self.experts, 1)


@dataclass(frozen=True)
class DiskAdapter:
    """An adapter folder whose config and header were read and found sound.

    Attributes:
        folder: Where it is.
        config: Its LoraConfig.
        parts: By module path.
        replaced: Parameter name -> tensor that takes its place (modules_to_save, biases, saved embeddings).
        unplaced: Tensors by what they are, by module path, of an adapter with ``target_parameters``: to whom
            they belong only the model tells, see ``placed``. ``parts`` is empty then.
    """

    folder: Path
    config: LoraConfig
    parts: dict[str, ModulePart]
    replaced: dict[str, TensorEntry] = field(default_factory=dict)
    unplaced: dict[str, dict[str, TensorEntry]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, *, to_merge: bool = True) -> DiskAdapter:
        """Read the config and the header; no tensor.

        Args:
            folder: Holds PEFT's two files.
            to_merge: Refuse an adapter whose initialisation changed the base.

        Raises:
            InputError: not an adapter folder, a broken file, or an adapter that cannot be merged on disk.
            OSError: a file cannot be read.
        """
        if not (folder / CONFIG_FILE).is_file():
            raise InputError(f"{folder} is not an adapter: it has no {CONFIG_FILE}{_hint(folder)}")
        weights = folder / ADAPTER_WEIGHTS_FILE
        if not weights.is_file():
            if (folder / PICKLED_WEIGHTS).exists():
                raise InputError(
                    f"{folder} holds {PICKLED_WEIGHTS}, a pickle that could run code; convert it with PEFT's "
                    "save_pretrained where you trust it"
                )
            raise InputError(f"{folder} has no {ADAPTER_WEIGHTS_FILE}")
        for file in (folder / CONFIG_FILE, weights):
            if not is_inside(file, folder):
                raise InputError(f"{file} is a link to {file.resolve()}, outside the folder; copy the file")
        config = _read_config(folder)
        if to_merge:
            _check_base_is_the_original(folder, config)
        tensors = read_header(weights)[0]
        modules: dict[str, dict[str, TensorEntry]] = {}
        replaced: dict[str, TensorEntry] = {}
        for key, entry in tensors.items():
            path, kind = _parse(key.removeprefix(KEY_PREFIX))
            if kind:
                modules.setdefault(path, {})[kind] = entry
                if ".lora_embedding_" in key:
                    modules[path]["embedding"] = entry
            elif path not in replaced or ".modules_to_save." not in key:
                replaced[path] = entry
        replaced = {name: entry for name, entry in replaced.items() if ".original_module." not in name}
        if not modules and not replaced:
            raise InputError(f"{weights} holds no tensors")
        if config.target_parameters:
            return cls(folder, config, {}, replaced, modules)
        parts = {path: _part(config, path, found) for path, found in modules.items()}
        return cls(folder, config, parts, replaced)

    def placed(
        self, parameters: Mapping[str, tuple[int, ...]], is_stored_in_out: Callable[[str], bool]
    ) -> DiskAdapter:
        """The adapter with ``parts`` of all that was unplaced; those of Parameters under their own names.

        Several adapted Parameters of one module are wrapped one around the other in the order in which the
        module has them, and so the keys of the first have most ``base_layer`` in them.

        Args:
            parameters: Of the model with their shapes, those of a module in its order.
            is_stored_in_out: Whether the matrices of the stacks in a module (its path) are (in, out).

        Raises:
            InputError: a Parameter without its factors, factors without a Parameter, or shapes that differ.
        """
        if not self.unplaced:
            return self
        left, parts = dict(self.unplaced), dict(self.parts)
        wanted = set(self.config.target_parameters or ())
        endings = tuple(f".{name}" for name in wanted)
        owners: dict[str, list[str]] = {}
        for name in parameters:
            if name in wanted or name.endswith(endings):
                path, _, leaf = name.rpartition(".")
                owners.setdefault(path, []).append(leaf)
        for path, leaves in owners.items():
            for depth, leaf in enumerate(reversed(leaves)):
                key, name = path + ".base_layer" * depth, f"{path}.{leaf}"
                if key not in left:
                    raise InputError(
                        f"{self.folder / ADAPTER_WEIGHTS_FILE} has no factors for '{name}', which "
                        f"target_parameters={sorted(wanted)} names (they would be '{key}.lora_A.weight')"
                    )
                shape = parameters[name]
                in_out = len(shape) == 3 and is_stored_in_out(path)
                parts[name] = _parameter_part(self.config, name, left.pop(key), shape, in_out)
        for path in left:
            if path.endswith(".base_layer"):
                raise InputError(
                    f"{self.folder / ADAPTER_WEIGHTS_FILE} has factors under '{path}', and no Parameter of "
                    f"the model is in their place: is it an adapter for another model?"
                )
        parts |= {path: _part(self.config, path, found) for path, found in left.items()}
        return replace(self, parts=parts, unplaced={})

    def fingerprint_of_base(self) -> str | None:
        """Hash of the codes of the base that it was solved or trained on, if the folder says so."""
        return read_codes_hash(self.folder)

    def tokenizer_files(self) -> list[Path]:
        """Files beside the adapter that a model's user needs, relative to the folder."""
        found = {p for g in SIDE_FILES for p in self.folder.glob(g) if p.is_file() and "token" in p.name}
        return [path.relative_to(self.folder) for path in sorted(found) if is_inside(path, self.folder)]


def read_codes_hash(folder: Path) -> str | None:
    """``codes_sha256`` of the folder's fingerprint file; None without one."""
    path = folder / FINGERPRINT_FILE
    value = read_json_object(path).get("codes_sha256") if path.is_file() else None
    return value if isinstance(value, str) else None


def _hint(folder: Path) -> str:
    below = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}"))
    return f" (there is one in {folder / below[0]})" if below else ""


def _read_config(folder: Path) -> LoraConfig:
    values = read_json_object(folder / CONFIG_FILE, strict=True)
    kind = values.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{folder / CONFIG_FILE}: peft_type is {kind!r}; only LORA is known here")
    try:
        config: LoraConfig = LoraConfig.from_pretrained(folder)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder / CONFIG_FILE}: {error}") from error
    _check_types(folder / CONFIG_FILE, config)
    return config


def _check_base_is_the_original(folder: Path, config: LoraConfig) -> None:
    init = str(config.init_lora_weights).lower()
    if init.startswith(_CHANGES_BASE):
        raise InputError(
            f"{folder} was initialised by {init}, which changed its base; save it with "
            "path_initial_model_for_weight_conversion first, which makes it an adapter for the original base"
        )


def _check_types(path: Path, config: LoraConfig) -> None:
    """The values that merging and training compute with; the dataclass takes anything."""
    dropout = config.lora_dropout
    if not isinstance(dropout, (int, float)) or isinstance(dropout, bool) or not 0 <= dropout < 1:
        raise InputError(f"{path}: lora_dropout is {dropout!r:.60}, not a number in [0, 1)")
    names = config.target_parameters or []
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: target_parameters is {names!r:.60}, not a list of names")
    tokens = config.trainable_token_indices or []
    numbers = {"r": [config.r], "lora_alpha": [config.lora_alpha]}
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, name)
        if not isinstance(patterns, dict):
            raise InputError(f"{path}: {name} is {patterns!r:.60}, not a map from module names to numbers")
        numbers[name] = list(patterns.values())
    for name, found in numbers.items():
        wanted: Any = (int, float) if "alpha" in name else int
        for value in found:
            if not isinstance(value, wanted) or isinstance(value, bool) or not abs(value) < 1 << 53:
                raise InputError(f"{path}: {name} has the value {value!r:.60}, not a number")
            if value < 1 and "alpha" not in name:
                raise InputError(f"{path}: {name} has the value {value!r:.60}; a rank is at least 1")
    for rows in tokens.values() if isinstance(tokens, dict) else [tokens]:
        if not isinstance(rows, list) or not all(type(row) is int and 0 <= row < 1 << 31 for row in rows):
            raise InputError(f"{path}: trainable_token_indices is {tokens!r:.60}, not lists of token ids")


def _parameter_part(
    config: LoraConfig, name: str, found: dict[str, TensorEntry], shape: tuple[int, ...], in_out: bool
) -> ModulePart:
    """What the adapter does to the Parameter ``name`` of two or three dimensions."""
    A, B = found.get("A"), found.get("B")
    if A is None or B is None or set(found) != {"A", "B"} or len(shape) not in (2, 3):
        entry = next(iter(found.values()))
        raise InputError(
            f"{entry.path}: a Parameter of two or three dimensions has a lora_A and a lora_B; '{name}' "
            f"{shape} has {', '.join(sorted(found))}"
        )
    rank = pattern_value(config.rank_pattern, name, config.r, field_name="rank_pattern")
    alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha, field_name="alpha_pattern")
    experts = shape[0] if len(shape) == 3 else 0
    if experts:
        check_stack(release_of_stacks(config), name, in_out)
    out_features, in_features = reversed(shape[-2:]) if in_out else shape[-2:]
    total = rank * max(experts, 1)
    expected = ((total, in_features), (out_features, total))
    if (A.shape, B.shape) != expected:
        raise InputError(
            f"the adapter of '{name}' has A {A.shape} and B {B.shape}; its shape {shape} and rank {rank} "
            f"need {expected[0]} and {expected[1]}"
        )
    path, _, leaf = name.rpartition(".")
    return ModulePart(
        path,
        A=A,
        B=B,
        scaling=alpha / (math.sqrt(rank) if config.use_rslora else rank),
        parameter=leaf,
        as_stored=True,
        experts=experts,
        in_out=in_out,
    )


def _parse(key: str) -> tuple[str, str]:
    """(module path, part), or (parameter name, "")."""
    for ending, kind in _PARTS.items():
        if key.endswith(ending):
            return key.removesuffix(ending), kind
    key = re.sub(r"\.(token_adapter\.)?base_layer\.", ".", key)
    # With bias="all" PEFT also writes the biases inside its wrappers, under their names in memory.
    return re.sub(r"\.modules_to_save\.[^.]+\.", ".", key), ""


def _part(config: LoraConfig, path: str, found: dict[str, Any]) -> ModulePart:
    A, B = found.get("A"), found.get("B")
    tokens = found.get("tokens")
    indices = _token_indices(config, path) if tokens is not None else ()
    if tokens is not None and tokens.shape[0] != len(indices):
        raise InputError(
            f"{tokens.path}: '{tokens.name}' has {tokens.shape[0]} rows, {CONFIG_FILE} names "
            f"{len(indices)} tokens"
        )
    if (A is None) != (B is None) or (A is None and ("magnitude" in found or "bias" in found)):
        entry = next(iter(found.values()))
        raise InputError(f"{entry.path}: the adapter of '{path}' is incomplete: it lacks lora_A or lora_B")
    if A is None:
        return ModulePart(path, tokens=tokens, token_indices=indices)
    rank = pattern_value(config.rank_pattern, path, config.r, field_name="rank_pattern")
    alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha, field_name="alpha_pattern")
    if A.shape[0] != rank:
        raise InputError(
            f"{A.path}: '{A.name}' has rank {A.shape[0]}, {CONFIG_FILE} says {rank} for '{path}'"
        )
    if "magnitude" in found and not config.use_dora:
        raise InputError(f"{A.path}: '{path}' has a DoRA magnitude, but {CONFIG_FILE} has no use_dora")
    if config.use_dora and "magnitude" not in found:
        raise InputError(f"{A.path}: {CONFIG_FILE} has use_dora, but '{path}' has no DoRA magnitude")
    return ModulePart(
        path,
        A=A,
        B=B,
        bias=found.get("bias"),
        magnitude=found.get("magnitude"),
        scaling=alpha / (math.sqrt(rank) if config.use_rslora else rank),
        tokens=tokens,
        token_indices=indices,
        embedding="embedding" in found,
    )


def _token_indices(config: LoraConfig, path: str) -> tuple[int, ...]:
    wanted = config.trainable_token_indices
    if isinstance(wanted, dict):
        names: Iterable[str] = (name for name in wanted if path == name or path.endswith(name))
        name = next(iter(names), None)
        return tuple(wanted[name]) if name is not None else ()
    return tuple(wanted or ())
