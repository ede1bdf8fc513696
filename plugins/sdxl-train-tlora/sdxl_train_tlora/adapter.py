"""The network attached to a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdxl_train import ParameterGroup, require_fit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from sdxl_train import LoadedModel
    from sdxl_train_tlora import TLora


class TimestepLinear(nn.Module):
    """The delta of one linear layer: ``scale * (up mask(t) down - start)`` times the input.

    ``start`` is what orthonormal factors give before training, in two frozen factors; with zeros in
    ``up`` there is none. In the file it is part of the two factors, which have twice the rank then.
    """

    def __init__(self, layer: nn.Linear, options: TLora, alpha: float) -> None:
        super().__init__()
        device, rank = layer.weight.device, options.rank
        self.down = nn.Parameter(torch.empty(rank, layer.in_features, device=device))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank, device=device))
        self.start: tuple[Tensor, Tensor] | None = None
        if options.orthogonal:
            _fill_orthonormal(self.down)
            _fill_orthonormal(self.up)
            self.start = (self.down.detach().clone(), self.up.detach().clone())
        else:
            nn.init.kaiming_uniform_(self.down, a=5**0.5)
        self.scale = alpha / rank
        self.dropout = options.network_dropout or 0.0

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Give the delta of the output for inputs [B, ..., in], in their dtype.

        Args:
            x: The inputs.
            mask: Which ranks act in each sample, [B, rank]; None: all.
        """
        hidden = functional.linear(x, self.down.to(x.dtype))
        delta = functional.linear(self._acting(hidden, mask), self.up.to(x.dtype))
        if self.start is not None:
            down, up = (factor.to(x.dtype) for factor in self.start)
            # Of what was there at the start, too, only the ranks that act are taken off again.
            delta = delta - functional.linear(self._masked(functional.linear(x, down), mask), up)
        return delta * self.scale

    def _acting(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        return functional.dropout(self._masked(hidden, mask), self.dropout, self.training)

    def _masked(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return hidden
        # An attention layer may see [B * heads, ...]; a linear layer of SDXL sees the batch first.
        shape = (mask.shape[0], *[1] * (hidden.ndim - 2), mask.shape[1])
        return hidden * mask.view(shape).to(hidden.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Give ``down`` and ``up`` of the file, whose product is the whole delta over the scale."""
        down, up = self.down.detach(), self.up.detach()
        if self.start is None:
            return down, up
        return torch.cat([down, self.start[0]]), torch.cat([up, -self.start[1]], dim=1)

    def take(self, down: Tensor, up: Tensor) -> None:
        """Take the factors of a file."""
        rank = self.down.shape[0]
        with torch.no_grad():
            self.down.copy_(down[:rank])
            self.up.copy_(up[:, :rank])
            if self.start is not None:
                self.start[0].copy_(down[rank:])
                self.start[1].copy_(-up[:, rank:])


def _fill_orthonormal(factor: Tensor) -> None:
    """Fill a matrix with orthonormal rows or columns, whichever are fewer."""
    if not factor.is_meta:
        nn.init.orthogonal_(factor)


class TimestepAdapter:
    """All deltas; implements ``sdxl_train.Adapter``."""

    multiplier: float = 1.0

    def __init__(self, options: TLora, model: LoadedModel) -> None:
        self.options = options
        self._alpha = options.network_alpha or float(options.rank)
        self._num_timesteps = model.schedule.num_timesteps
        self._mask: Tensor | None = None
        self._deltas: dict[str, TimestepLinear] = {}
        self._groups: list[ParameterGroup] = []
        self._handles: list[Any] = []
        for part in model.parts:
            parameters: list[nn.Parameter] = []
            for path, name in part.file_names.items():
                layer = part.module.get_submodule(path)
                if isinstance(layer, nn.Linear):
                    delta = TimestepLinear(layer, options, self._alpha)
                    self._deltas[f"{part.prefix}_{name}"] = delta
                    # Text encoders are asked before there is a timestep, with other batches.
                    hook = self._hook(delta, masked=part.module is model.denoiser)
                    self._handles.append(layer.register_forward_hook(hook))
                    parameters += delta.parameters()
            self._groups.append(
                ParameterGroup(part=part.name, name=part.group, parameters=parameters, lr=part.lr)
            )

    def _hook(
        self, delta: TimestepLinear, *, masked: bool
    ) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def add(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            mask = self._mask if masked and delta.training else None
            added: Tensor = self.multiplier * delta(inputs[0], mask)
            return output + added

        return add

    def modules(self) -> Iterable[nn.Module]:
        """Give the modules whose training mode decides on dropout and on the mask."""
        return self._deltas.values()

    def groups(self) -> Sequence[ParameterGroup]:
        """Give one group for each part."""
        return self._groups

    def prepare_step(self, timesteps: Tensor) -> None:
        """Choose the ranks that act at each of the timesteps [B]: the first ``r(t)``."""
        options, rank = self.options, self.options.rank
        share = (1.0 - timesteps.double() / self._num_timesteps) ** options.rank_power
        acting = options.min_rank + ((rank - options.min_rank) * share).floor()
        positions = torch.arange(rank, device=timesteps.device)
        self._mask = (positions < acting[:, None]).float()

    def state_dict(self) -> dict[str, Tensor]:
        """Give the tensors of the file, under the names of LoRA."""
        state = {}
        for name, delta in self._deltas.items():
            down, up = delta.factors()
            state[f"{name}.lora_down.weight"] = down
            state[f"{name}.lora_up.weight"] = up
            state[f"{name}.alpha"] = torch.tensor(delta.scale * down.shape[0])
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the tensors of a file. Raises UserError for any other set of keys or shapes."""
        require_fit(self.state_dict(), state)
        for name, delta in self._deltas.items():
            delta.take(state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"])

    def metadata(self) -> dict[str, str]:
        """Describe the network for the header of files."""
        return {"ss_network_dim": str(self.options.rank), "ss_network_alpha": str(self._alpha)}

    def detach(self) -> None:
        """Give the model back."""
        for handle in self._handles:
            handle.remove()
