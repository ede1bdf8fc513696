"""The trainable side of a run: a network on a model, and its parameters in optimizer groups."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from sdxl_train.errors import UserError
from sdxl_train.heap import give_back_large_blocks
from sdxl_train.protocols import QuantizableModel
from sdxl_train.rng import derive_seed, global_generators_kept, seed_global_generators
from sdxl_train.weights import start_from
from sdxl_train.without_compiler import build_without_compiler

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sdxl_train.config import RunConfig
    from sdxl_train.protocols import Adapter, LoadedModel, ParameterGroup

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Type of the frozen weights, by ``--mixed_precision``."""
SAVED_DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Type of the weights in files, by ``--save_precision``."""


def saved_precision(config: RunConfig) -> Literal["float", "fp16", "bf16"]:
    """Give the precision of files: the one that is asked for, else the one that trains."""
    trained = config.training.trained_precision
    return config.output.save_precision or ("float" if trained == "no" else trained)


@dataclass(frozen=True, kw_only=True)
class ModuleCount:
    """How much of a part is adapted."""

    title: str
    modules: int
    parameters: int


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """A model with its network attached.

    Attributes:
        groups: torch parameter groups: dicts with ``name``, ``lr`` and ``params``.
        parts: What is adapted of each part of the model, by the part's name.
    """

    model: LoadedModel
    adapter: Adapter
    groups: list[dict[str, Any]]
    parts: dict[str, ModuleCount]

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Everything that trains."""
        return [parameter for group in self.groups for parameter in group["params"]]


def assemble(config: RunConfig, device: torch.device | str, seed: int) -> Assembly:
    """Load the model and attach a fresh network, the same one for the same seed.

    Raises:
        UserError: If nothing is left to train, or the weights to begin with do not fit.
    """
    dtype = WEIGHT_DTYPES[config.training.mixed_precision]
    model = config.model.build(device, dtype)
    if networks := config.network.merged():
        # Before the network is attached: DoRA begins with the norms of the merged weights.
        model.merge_networks(networks)
    if form := config.quantization.build():
        # After merging, or its rounding would be that of the stored weights.
        _require_quantizable(config, model).quantize(
            form, denoiser_only=config.quantization.denoiser_only
        )
    if torch.device(device).type == "cpu" and (form or config.model.gradient_checkpointing):
        give_back_large_blocks()
    # Initialisers know only global generators; what they draw must not depend on their past.
    with global_generators_kept():
        seed_global_generators(derive_seed(seed, "init"))
        adapter = config.network.build(model)
    if config.network.network_weights is not None:
        place = config.place("network_weights")
        start_from(adapter, model, config.network.network_weights, place)
    declared = list(adapter.groups())
    groups = list(_optimizer_groups(declared, config.optimizer.learning_rate))
    if not groups:
        raise UserError.of(
            config.place("network_module"),
            f"{config.name_of('network')} adapts no module of this model: nothing would train",
            "check its options and the learning rates",
        )
    _require_one_rate(config, groups)
    stuck = [p for group in groups for p in group["params"] if not (p.is_leaf and p.requires_grad)]
    if stuck:
        raise UserError.of(
            config.place("network_module"),
            f"{len(stuck)} parameters of {config.name_of('network')} cannot be trained: they are "
            f"computed from others, or require no gradient",
            "tell its author: Adapter.groups() gives leaf tensors that require a gradient",
        )
    return Assembly(
        model=model, adapter=adapter, groups=groups, parts=_count(model, adapter, declared)
    )


def _require_quantizable(config: RunConfig, model: LoadedModel) -> QuantizableModel:
    """Refuse a model whose weights cannot be stored otherwise.

    Raises:
        UserError: If that is asked for all the same.
    """
    if not isinstance(model, QuantizableModel):
        raise UserError.of(
            config.place("base_quantization"),
            f"models of {config.name_of('model')} cannot be stored as "
            f"{config.name_of('quantization')}",
            "leave it out",
        )
    return model


def build_optimizer(config: RunConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Build the optimizer of a run.

    Raises:
        UserError: If the component gives something else.
    """
    optimizer: object = build_without_compiler(partial(config.optimizer.build, groups))
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError.of(
            config.place("optimizer_type"),
            f"{config.name_of('optimizer')} gave a {type(optimizer).__name__}, expected a "
            f"torch.optim.Optimizer",
            "tell its author",
        )
    return optimizer


def _require_one_rate(config: RunConfig, groups: Sequence[dict[str, Any]]) -> None:
    """Refuse rates that differ, if the optimizer can only have one.

    Raises:
        UserError: With each group's rate, naming the options that may have set them.
    """
    if not config.optimizer.single_lr or len({group["lr"] for group in groups}) == 1:
        return
    rates = ", ".join(f"{group['name']} {group['lr']:g}" for group in groups)
    raise UserError.of(
        ", ".join([config.place("optimizer_type"), *config.given_rates()]),
        f"{config.name_of('optimizer')} has one learning rate for all groups, not {rates}",
        "leave the rates of the parts and LoRA+ out, and set --learning_rate 1",
    )


def _optimizer_groups(
    declared: Sequence[ParameterGroup], learning_rate: float
) -> Iterator[dict[str, Any]]:
    """Join groups of one name and rate; where rates differ, each part has a group of its own."""
    by_name: dict[str, dict[float, list[ParameterGroup]]] = {}
    for group in declared:
        rate = (learning_rate if group.lr is None else group.lr) * group.lr_factor
        if group.parameters:
            by_name.setdefault(group.name, {}).setdefault(rate, []).append(group)
    for name, by_rate in by_name.items():
        for rate, members in by_rate.items():
            parts = " ".join(dict.fromkeys(member.part for member in members))
            yield {
                "name": name if len(by_rate) == 1 else f"{name} {parts}",
                "lr": rate,
                "params": [parameter for member in members for parameter in member.parameters],
            }


def _count(
    model: LoadedModel, adapter: Adapter, declared: Sequence[ParameterGroup]
) -> dict[str, ModuleCount]:
    modules = {key.partition(".")[0] for key in adapter.state_dict()}
    return {
        part.name: ModuleCount(
            title=part.title,
            modules=sum(module.startswith(f"{part.prefix}_") for module in modules),
            parameters=sum(
                parameter.numel()
                for group in declared
                if group.part == part.name
                for parameter in group.parameters
            ),
        )
        for part in sorted((*model.parts, *model.frozen_parts), key=lambda part: part.name)
    }
