"""What the networks share: a delta on each chosen layer, in groups, files and back."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from sdxl_lora_plugins.networks.targets import targets
from sdxl_train import ParameterGroup, limit_norms, require_fit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from sdxl_lora_plugins.networks import BlockNetwork
    from sdxl_lora_plugins.networks.targets import Target
    from sdxl_train import LoadedModel


class AdaptedLayer(nn.Module):
    """The delta of one layer. Its parameters are fp32, on the device of the layer.

    There is no train or eval: every dropout acts while gradients are recorded, so training has it
    and sampling and validation use the whole network.
    """

    def __init__(self, target: Target, options: BlockNetwork) -> None:
        super().__init__()
        self.rank = target.rank
        self.alpha = target.alpha
        self.dropout = options.network_dropout or 0.0
        self.rank_dropout = options.rank_dropout
        self.module_dropout = options.module_dropout
        self.multiplier = 1.0
        self._channels = 1 if isinstance(target.layer, nn.Conv2d) else -1
        self._base_forward = target.layer.forward

    def forward(self, x: Tensor) -> Tensor:
        """Give the adapted output of the layer for its input."""
        if self.multiplier != 1.0:
            base: Tensor = self._base_forward(x)
            return base + self.multiplier * (self.adapted(x) - base)
        return self._base_forward(x) if self._skips() else self.adapted(x)

    @abstractmethod
    def adapted(self, x: Tensor) -> Tensor:
        """Give the output with the delta."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Give the tensors of a file by their names behind the layer's; ``alpha`` is fp32 []."""

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors that have the names and shapes of :meth:`tensors`."""

    @abstractmethod
    def norm(self) -> Tensor:
        """Give the Frobenius norm of the delta weight, fp32 []."""

    @abstractmethod
    def shrink(self, ratio: Tensor) -> None:
        """Multiply the delta weight in place, by a factor in [0, 1]."""

    def plus_parameters(self) -> list[nn.Parameter]:
        """Give the parameters that LoRA+ trains faster."""
        return []

    @property
    def drops(self) -> bool:
        """Whether :meth:`dropped` changes values now."""
        return torch.is_grad_enabled() and bool(self.dropout or self.rank_dropout)

    def dropped(self, values: Tensor) -> Tensor:
        """Drop single values and whole channels of [B, ..., C], or [B, C, h, w] of convolutions.

        What stays is scaled, so that the mean is the same.
        """
        if not self.drops:
            return values
        if self.dropout:
            values = F.dropout(values, self.dropout)
        if self.rank_dropout:
            shape = [1] * values.ndim
            shape[0], shape[self._channels] = values.shape[0], values.shape[self._channels]
            kept = torch.rand(shape, device=values.device) >= self.rank_dropout
            values = values * kept / (1 - self.rank_dropout)
        return values

    def _skips(self) -> bool:
        """Tell whether module dropout leaves the layer unadapted this time."""
        if not self.module_dropout or not torch.is_grad_enabled():
            return False
        # Drawn on the CPU: nothing waits for the device.
        return torch.rand(()).item() < self.module_dropout


def initial_device(layer: nn.Module) -> torch.device:
    """Give where to draw a layer's factors: the CPU, so a seed means the same on every device."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight.device if weight.is_meta else torch.device("cpu")


def _like(layer: nn.Module) -> dict[str, Any]:
    """Give where a layer's weight is, and how it is laid out in memory, for what adapts it."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    if weight.is_contiguous():
        return {"device": weight.device}
    return {"device": weight.device, "memory_format": torch.channels_last}


class LayerAdapter:
    """A network of one delta for each chosen layer; implements ``sdxl_train.Adapter``.

    The layers of the model stay where and what they are; only their ``forward`` is replaced, so
    code that looks at their weights keeps working.
    """

    def __init__(
        self,
        model: LoadedModel,
        options: BlockNetwork,
        make_layer: Callable[[Target], AdaptedLayer],
    ) -> None:
        self.options = options
        self.parts = {part.name: part for part in model.parts}
        self.denoiser = model.denoiser
        self.targets = list(targets(model, options))
        self.layers = {
            target.name: make_layer(target).to(**_like(target.layer)) for target in self.targets
        }
        self.multiplier = 1.0
        self._own_forwards = {
            target.name: vars(target.layer).get("forward") for target in self.targets
        }
        for target in self.targets:
            target.layer.forward = self.layers[target.name].forward  # type: ignore[assignment]

    @property
    def multiplier(self) -> float:
        """How much of the network acts."""
        return self._multiplier

    @multiplier.setter
    def multiplier(self, value: float) -> None:
        self._multiplier = value
        for layer in self.layers.values():
            layer.multiplier = value

    def modules(self) -> Iterable[nn.Module]:
        """Give the layers' deltas."""
        return self.layers.values()

    def groups(self) -> Sequence[ParameterGroup]:
        """Give the groups of each part: by block where rates are, and LoRA+'s apart."""
        members: dict[tuple[str, str, float | None, float], list[nn.Parameter]] = {}
        for target in self.targets:
            layer = self.layers[target.name]
            ratio = self.options.plus_ratio(
                is_denoiser=self.parts[target.part].module is self.denoiser
            )
            faster = {id(parameter) for parameter in layer.plus_parameters()}
            for parameter in layer.parameters():
                key = (target.part, target.group, target.lr, target.lr_factor)
                if ratio is not None and id(parameter) in faster:
                    factor = target.lr_factor * ratio
                    key = (target.part, f"{target.group} plus", target.lr, factor)
                members.setdefault(key, []).append(parameter)
        return [
            ParameterGroup(
                part=part,
                name=name,
                parameters=parameters,
                lr=lr,
                lr_factor=factor,
            )
            for (part, name, lr, factor), parameters in members.items()
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """Give the tensors of every layer, as clients read them."""
        return {
            f"{name}.{key}": tensor
            for name, layer in self.layers.items()
            for key, tensor in layer.tensors().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the tensors of a file with exactly these layers, ranks and alphas.

        Raises:
            UserError: If a key is missing or unknown, or a shape or alpha differs.
        """
        require_fit(self.state_dict(), state)
        for name, layer in self.layers.items():
            layer.load({key: state[f"{name}.{key}"] for key in layer.tensors()})

    def metadata(self) -> dict[str, str]:
        """Give rank and alpha, and what the network says of itself.

        ``Dynamic`` is sd-scripts' word for a file whose layers differ.
        """
        rank: int = self.options.rank
        alpha = float(self.options.network_alpha or rank)
        metadata = {"ss_network_dim": str(rank), "ss_network_alpha": str(alpha)}
        if self.options.dim_from_weights:
            ranks = {str(target.rank) for target in self.targets}
            alphas = {str(target.alpha) for target in self.targets}
            metadata["ss_network_dim"] = ranks.pop() if len(ranks) == 1 else "Dynamic"
            metadata["ss_network_alpha"] = alphas.pop() if len(alphas) == 1 else "Dynamic"
        return {**metadata, **self.options.metadata()}

    def prepare_step(self, timesteps: Tensor) -> None:
        """Do nothing: these networks are the same at every timestep."""

    def limit_weights(self) -> Mapping[str, Tensor]:
        """Shrink the deltas that are larger than ``scale_weight_norms`` allows."""
        limit = self.options.scale_weight_norms
        return {} if limit is None else limit_norms(self.layers.values(), limit)

    def detach(self) -> None:
        """Give every layer the ``forward`` back that it had."""
        for target in self.targets:
            own = self._own_forwards[target.name]
            if own is None:
                del target.layer.forward
            else:
                target.layer.forward = own  # type: ignore[method-assign]
