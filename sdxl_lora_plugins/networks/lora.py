"""LoRA (Hu et al. 2022): ``y = W x + (alpha / r) B A x`` with ``A`` [r, in] and ``B`` [out, r]."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from sdxl_lora_plugins.networks.targets import attention_targets
from sdxl_train import ParameterGroup, UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from sdxl_lora_plugins.networks.targets import Target
    from sdxl_train import LoadedModel


class LoraLayer(nn.Module):
    """The low-rank delta of one layer. Its factors are fp32, on the device of the layer.

    ``lora_down`` starts as sd-scripts does (Kaiming uniform with a = sqrt(5)), ``lora_up`` at
    zero, so a fresh layer changes nothing.
    """

    def __init__(self, target: Target, *, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        layer = target.layer
        device = layer.weight.device
        self.lora_down: nn.Linear | nn.Conv2d
        self.lora_up: nn.Linear | nn.Conv2d
        if isinstance(layer, nn.Linear):
            self.lora_down = nn.Linear(layer.in_features, rank, bias=False, device=device)
            self.lora_up = nn.Linear(rank, layer.out_features, bias=False, device=device)
        else:
            self.lora_down = nn.Conv2d(
                layer.in_channels,
                rank,
                layer.kernel_size,  # type: ignore[arg-type]
                layer.stride,  # type: ignore[arg-type]
                layer.padding,  # type: ignore[arg-type]
                bias=False,
                device=device,
            )
            self.lora_up = nn.Conv2d(rank, layer.out_channels, 1, bias=False, device=device)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)
        self.dropout = dropout
        self.alpha = alpha
        self.scale = alpha / rank
        self._base_forward = layer.forward

    def forward(self, x: Tensor) -> Tensor:
        """Give the adapted output of the layer for its input.

        Dropout acts while gradients are recorded: sampling and validation use the whole network.
        """
        low = F.dropout(self.lora_down(x), self.dropout, training=torch.is_grad_enabled())
        delta: Tensor = self.lora_up(low)
        return self._base_forward(x) + delta * self.scale


class LoraAdapter:
    """LoRA on every attention and feed-forward layer of the parts that train.

    The layers stay where and what they are; only their ``forward`` is replaced, so code that looks
    at their weights keeps working.
    """

    def __init__(self, model: LoadedModel, *, rank: int, alpha: float, dropout: float) -> None:
        self.rank = rank
        self.alpha = alpha
        self.parts = {part.name: part for part in model.parts}
        self.targets = [target for part in model.parts for target in attention_targets(part)]
        self.layers = {
            target.name: LoraLayer(target, rank=rank, alpha=alpha, dropout=dropout)
            for target in self.targets
        }
        for target in self.targets:
            target.layer.forward = self.layers[target.name].forward  # type: ignore[assignment]

    def groups(self) -> Sequence[ParameterGroup]:
        """Give one group for each part."""
        return [
            ParameterGroup(
                part=part.name,
                name=part.group,
                parameters=[
                    parameter
                    for target in self.targets
                    if target.part == part.name
                    for parameter in self.layers[target.name].parameters()
                ],
                lr=part.lr,
            )
            for part in self.parts.values()
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """Give ``lora_down.weight``, ``lora_up.weight`` and ``alpha`` of every layer."""
        state: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            state[f"{name}.alpha"] = torch.tensor(float(layer.alpha))
            state[f"{name}.lora_down.weight"] = layer.lora_down.weight.detach()
            state[f"{name}.lora_up.weight"] = layer.lora_up.weight.detach()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the tensors of a file with exactly these layers and this rank and alpha.

        Raises:
            UserError: If a key is missing or unknown, or a shape or alpha differs.
        """
        own = self.state_dict()
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unknown:
            raise UserError.of(
                "network weights",
                f"{len(missing)} keys are missing (first: {missing[:3]}), {len(unknown)} are "
                f"unknown (first: {unknown[:3]})",
            )
        for name, tensor in own.items():
            if state[name].shape != tensor.shape:
                raise UserError.of(
                    name, f"has shape {list(state[name].shape)}, expected {list(tensor.shape)}"
                )
            if name.endswith(".alpha") and not torch.isclose(state[name].float(), tensor):
                raise UserError.of(name, f"is {state[name].item():g}, expected {tensor.item():g}")
        for name, tensor in own.items():
            if not name.endswith(".alpha"):
                tensor.copy_(state[name])

    def metadata(self) -> dict[str, str]:
        """Give rank and alpha."""
        return {"ss_network_dim": str(self.rank), "ss_network_alpha": str(float(self.alpha))}

    def prepare_step(self, timesteps: Tensor) -> None:
        """Do nothing: plain LoRA is the same at every timestep."""

    def detach(self) -> None:
        """Give every layer its own ``forward`` back."""
        for target in self.targets:
            del target.layer.forward
