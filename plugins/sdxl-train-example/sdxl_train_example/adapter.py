"""The network attached to a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sdxl_train import ParameterGroup, require_fit
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from sdxl_train import LoadedModel


class LowRankLinear(nn.Module):
    """The delta of one linear layer, added to its output by a forward hook."""

    def __init__(self, layer: nn.Linear, *, rank: int, alpha: float, dropout: float) -> None:
        """Begin with a delta of zero: ``up`` is zero, ``down`` is random."""
        super().__init__()
        device = layer.weight.device
        self.down = nn.Parameter(torch.empty(rank, layer.in_features, device=device))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)
        self.alpha, self.scale, self.dropout = alpha, alpha / rank, dropout

    def forward(self, x: Tensor) -> Tensor:
        """Give the delta of the output for inputs [..., in], in the dtype of the input."""
        hidden = functional.linear(x, self.down.to(x.dtype))
        hidden = functional.dropout(hidden, self.dropout, self.training)
        return functional.linear(hidden, self.up.to(x.dtype)) * self.scale


class LowRankAdapter:
    """All deltas; implements ``sdxl_train.Adapter``."""

    multiplier: float = 1.0

    def __init__(self, model: LoadedModel, *, rank: int, alpha: float, dropout: float) -> None:
        """Attach a delta to each linear layer of the parts that train."""
        self._rank, self._alpha = rank, alpha
        self._deltas: dict[str, LowRankLinear] = {}
        self._groups: list[ParameterGroup] = []
        self._hooks = []
        for part in model.parts:
            parameters: list[nn.Parameter] = []
            for path, name in part.file_names.items():
                layer = part.module.get_submodule(path)
                if isinstance(layer, nn.Linear):
                    delta = LowRankLinear(layer, rank=rank, alpha=alpha, dropout=dropout)
                    self._deltas[f"{part.prefix}_{name}"] = delta
                    self._hooks.append(layer.register_forward_hook(self._hook(delta)))
                    parameters += delta.parameters()
            self._groups.append(
                ParameterGroup(part=part.name, name=part.group, parameters=parameters, lr=part.lr)
            )

    def _hook(self, delta: LowRankLinear) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def add(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            added: Tensor = self.multiplier * delta(inputs[0])
            return output + added

        return add

    def modules(self) -> Iterable[nn.Module]:
        """Give the modules whose training mode decides on dropout."""
        return self._deltas.values()

    def groups(self) -> Sequence[ParameterGroup]:
        """Give one group for each part."""
        return self._groups

    def state_dict(self) -> dict[str, Tensor]:
        """Give the tensors of the file, under the names of LoRA."""
        state = {}
        for name, delta in self._deltas.items():
            state[f"{name}.lora_down.weight"] = delta.down.detach()
            state[f"{name}.lora_up.weight"] = delta.up.detach()
            state[f"{name}.alpha"] = torch.tensor(float(delta.alpha))
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the tensors of a file. Raises UserError for any other set of keys or shapes."""
        own = self.state_dict()
        require_fit(own, state)
        for name, tensor in own.items():
            if tensor.ndim:
                tensor.copy_(state[name])

    def metadata(self) -> dict[str, str]:
        """Describe the network for the header of files."""
        return {"ss_network_dim": str(self._rank), "ss_network_alpha": str(self._alpha)}

    def prepare_step(self, timesteps: Tensor) -> None:
        """Do nothing: this network acts the same at every timestep."""

    def detach(self) -> None:
        """Give the model back."""
        for hook in self._hooks:
            hook.remove()
