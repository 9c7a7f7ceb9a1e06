"""One run of data through a model for EVA: components of what layers are fed, and the ranks they earn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import LoraConfig
from .init_configs import EvaConfig
from .running_pca import RunningPCA
from .targets import get_pattern_key

Prepare = Callable[[Any, Any, str], Tensor]


def _all_rows(layer_input: Any, _: Any, layer_name: str) -> Tensor:
    x = first_tensor(layer_input, layer_name)
    return x.reshape(-1, x.shape[-1])


def first_tensor(layer_input: Any, layer_name: str) -> Tensor:
    """The tensor that a layer is fed: its only positional input, or the first one.

    Raises:
        TypeError: something else.
    """
    if isinstance(layer_input, (tuple, list)):
        layer_input = layer_input[0]
    if not isinstance(layer_input, Tensor):
        raise TypeError(
            f"unsupported input type {type(layer_input)} for prepare_layer_inputs_fn in layer {layer_name}, "
            "please provide a custom prepare_layer_inputs_fn"
        )
    return layer_input


def eva_config(config: LoraConfig) -> EvaConfig:
    """The config's EVA settings; the defaults where it has none."""
    settings: Any = config.eva_config
    return settings if isinstance(settings, EvaConfig) else EvaConfig(**(settings or {}))


@dataclass(eq=False)
class _Group:
    """Layers that are fed the same tensor, and the components of it.

    Attributes:
        names: The layers; the first one is watched.
        prepare: From its input to rows.
        limit: Most components that one of them may get.
        pca: None until the first rows come.
        similarity: Cosine of each component to itself before the last batch.
    """

    names: list[str]
    prepare: Prepare
    limit: int
    pca: RunningPCA | None = None
    similarity: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        if self.pca is None:
            self.pca = RunningPCA(rows.shape[1], min(self.limit, rows.shape[1]))
        before = self.pca.components
        self.pca.add(rows)
        now = self.pca.components
        self.similarity = torch.zeros(len(now), device=now.device)
        shared = min(len(before), len(now))
        self.similarity[:shared] = (before[:shared].to(now.device) * now[:shared]).sum(1)

    def converged(self, ranks: Mapping[str, int], tau: float) -> bool:
        needed = max(ranks[name] for name in self.names)
        similarity = self.similarity
        if similarity is None or len(similarity) < needed:
            return False
        return bool((similarity[:needed] >= tau).all())


class EvaPass:
    """One run of data through the model."""

    def __init__(
        self,
        model: nn.Module,
        config: LoraConfig,
        targets: Mapping[str, nn.Module],
        prepare: Prepare | Mapping[str, Prepare] | None,
        gather: bool,
    ) -> None:
        self.model, self.config, self.targets, self.gather = model, config, targets, gather
        self.settings = eva_config(config)
        if isinstance(prepare, Mapping):
            unknown = [name for name in prepare if name not in targets]
            if unknown:
                raise ValueError(
                    "prepare_layer_inputs_fn is a mapping but the following module names were not found in "
                    f"the model: {unknown}"
                )
        self.prepare: dict[str, Prepare] = {
            name: (prepare.get(name) if isinstance(prepare, Mapping) else prepare) or _all_rows
            for name in targets
        }
        patterns = config.rank_pattern
        self.usual = {name: patterns.get(get_pattern_key(patterns, name), config.r) for name in targets}
        self.groups: list[_Group] = []
        self.ranks: dict[str, int] = {}
        self.about: Any = None  # what prepare_model_inputs_fn says of the batch

    def first(self, run: Callable[[], Any]) -> None:
        """Find out which layers are fed the same tensor in the first batch."""
        seen: dict[tuple[int, int, int], list[str]] = {}
        held: list[Tensor] = []

        def watch(name: str) -> Any:
            def see(_: nn.Module, args: tuple[Any, ...]) -> None:
                x = first_tensor(args, name)
                held.append(x)  # alive, so that no other tensor gets its id
                version = 0 if x.is_inference() else x._version
                names = seen.setdefault((id(x), version, id(self.prepare[name])), [])
                if not any(name in others for others in seen.values()):
                    names.append(name)

            return see

        with ExitStack() as stack:
            for name, module in self.targets.items():
                stack.callback(module.register_forward_pre_hook(watch(name)).remove)
            run()
        for names in filter(None, seen.values()):
            limit = max(round(self.usual[name] * self._rho()) for name in names)
            self.groups.append(_Group(names, self.prepare[names[0]], limit))

    def _rho(self) -> float:
        return min(self.settings.rho, 1000.0)

    def watch(self, group: _Group) -> Any:
        """The hook of one group's watched layer."""

        def see(_: nn.Module, args: tuple[Any, ...]) -> None:
            group.add(self._gathered(group.prepare(args, self.about, group.names[0])))

        return self.targets[group.names[0]].register_forward_pre_hook(see)

    def _gathered(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in the order of their ranks."""
        if not (self.gather and dist.is_available() and dist.is_initialized()):
            return rows
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, rows.cpu())
        return torch.cat([part.to(rows.device) for part in parts])

    def share_out(self) -> None:
        """Give the budget of ranks to the directions that explain most of their layer's variance."""
        if any(group.pca is None for group in self.groups):
            return
        names, ratios = [], []
        for group in self.groups:
            assert group.pca is not None
            for name in group.names:
                found = group.pca.explained_variance_ratio[: round(self.usual[name] * self._rho())]
                names += [name] * len(found)
                ratios.append(found.cpu())
        budget = sum(self.usual[name] for group in self.groups for name in group.names)
        self.ranks = {name: 0 for group in self.groups for name in group.names}
        for index in torch.cat(ratios).argsort(descending=True, stable=True)[:budget].tolist():
            self.ranks[names[index]] += 1

    def active(self) -> list[_Group]:
        """The groups whose components still move."""
        if not self.ranks:
            return self.groups
        return [group for group in self.groups if not group.converged(self.ranks, self.settings.tau)]

    def result(self) -> dict[str, Tensor]:
        """A by layer, (rank, in), float32, in the order of the modules."""
        short = [g for g in self.groups if g.pca is not None and len(g.pca.components) < self._least(g)]
        if short or not self.ranks:
            names = ", ".join(name for group in short for name in group.names) or "any layer"
            raise ValueError(f"eva: the data has too few tokens for the ranks of {names}; give more of it")
        found = {}
        for group in self.groups:
            assert group.pca is not None
            for name in group.names:
                A = group.pca.components[: self.ranks[name]]
                if self.settings.whiten:
                    A = A / group.pca.singular_values[: len(A)].sqrt().unsqueeze(1)
                found[name] = A.clone()
        return {name: found[name] for name in self.targets if name in found}

    def _least(self, group: _Group) -> int:
        assert group.pca is not None
        return min(max(self.usual[name] for name in group.names), group.pca.wanted)
