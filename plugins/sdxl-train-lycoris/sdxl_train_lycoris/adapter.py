"""A LyCORIS network on a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_train import ParameterGroup, quiet, require_fit
from sdxl_train_lycoris.layers import LycorisLayer
from sdxl_train_lycoris.targets import targets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from sdxl_train import LoadedModel
    from sdxl_train_lycoris.networks import LycorisNetwork
    from sdxl_train_lycoris.targets import Target


class LycorisAdapter:
    """A network of LyCORIS's modules on the layers that a preset chooses.

    The library's network classes keep presets as class attributes, shared by the process; they
    are not used. The layers of the model stay where and what they are: only their ``forward`` is
    replaced.
    """

    def __init__(self, model: LoadedModel, options: LycorisNetwork) -> None:
        self.options = options
        self.parts = model.parts
        self.targets = list(targets(model, options))
        # It warns of what the options ask for, such as a rank that leaves LoKr's factors whole.
        with quiet("LyCORIS"):
            self.layers = {target.name: LycorisLayer(target, options) for target in self.targets}
        self.multiplier = 1.0
        self._own_forwards = {
            target.name: vars(target.layer).get("forward") for target in self.targets
        }
        for target in self.targets:
            _replace_forward(target, self.layers[target.name].forward)

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
        """Give one group for each part that has adapted layers."""
        by_part = {
            part.name: [
                parameter
                for target in self.targets
                if target.part == part.name
                for parameter in self.layers[target.name].parameters()
            ]
            for part in self.parts
        }
        return [
            ParameterGroup(
                part=part.name, name=part.group, parameters=by_part[part.name], lr=part.lr
            )
            for part in self.parts
            if by_part[part.name]
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """Give the factors and ``alpha`` of every layer, as every client computes with them.

        LoHa and LoKr have an alpha equal to the rank, with the scale in their first factor.
        """
        return {
            f"{name}.{key}": tensor
            for name, layer in self.layers.items()
            for key, tensor in layer.state().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the tensors of a file with exactly these layers, shapes and alphas.

        A scale that is no power of two is undone with the last bit rounded.

        Raises:
            UserError: If a key is missing or unknown, or a shape or alpha differs.
        """
        require_fit(self.state_dict(), state)
        for name, layer in self.layers.items():
            layer.load({key: state[f"{name}.{key}"] for key in layer.state()})

    def metadata(self) -> dict[str, str]:
        """Describe the network as LyCORIS's users and tools know it."""
        return {
            "ss_network_module": "lycoris.kohya",
            "ss_network_dim": str(self.options.rank),
            "ss_network_alpha": str(float(self.options.network_alpha)),
            "ss_network_args": self.options.args(),
        }

    def prepare_step(self, timesteps: Tensor) -> None:
        """Do nothing: these networks are the same at every timestep."""

    def detach(self) -> None:
        """Give every layer the ``forward`` back that it had."""
        for target in self.targets:
            forward = self._own_forwards[target.name]
            if forward is None:
                del target.layer.forward
            else:
                _replace_forward(target, forward)


def _replace_forward(target: Target, forward: Callable[[Tensor], Tensor]) -> None:
    target.layer.forward = forward  # type: ignore[assignment, method-assign]
