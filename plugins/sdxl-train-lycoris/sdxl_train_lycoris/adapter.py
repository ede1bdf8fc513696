"""A LyCORIS network on a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_train import ParameterGroup, limit_norms, quiet, require_fit
from sdxl_train_lycoris.layers import LycorisLayer
from sdxl_train_lycoris.targets import targets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from sdxl_train import LoadedModel
    from sdxl_train_lycoris.options import LycorisNetwork
    from sdxl_train_lycoris.targets import Target


class LycorisAdapter:
    """A network of LyCORIS's modules on the layers that a preset chooses.

    The library's network classes keep presets as class attributes, shared by the process; they
    are not used. The layers of the model stay where and what they are: only their ``forward`` is
    replaced.
    """

    def __init__(self, model: LoadedModel, options: LycorisNetwork) -> None:
        self.options = options
        self.parts = {part.name: part for part in model.parts}
        self.denoiser = model.denoiser
        self.targets = list(targets(model, options))
        # It warns of what the options ask for, such as a rank that leaves LoKr's factors whole.
        with quiet("LyCORIS"):
            self.layers = {target.name: LycorisLayer(target) for target in self.targets}
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
        """Give one group for each part that has adapted layers, and LoRA+'s apart."""
        members: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for target in self.targets:
            layer = self.layers[target.name]
            faster: set[int] = set()
            if self._plus_ratio(target.part) is not None:
                faster = {id(parameter) for parameter in layer.delta.plus_parameters()}
            for parameter in layer.parameters():
                key = (target.part, id(parameter) in faster)
                members.setdefault(key, []).append(parameter)
        return [
            ParameterGroup(
                part=name,
                name=f"{self.parts[name].group} plus" if is_plus else self.parts[name].group,
                parameters=parameters,
                lr=self.parts[name].lr,
                lr_factor=(self._plus_ratio(name) or 1.0) if is_plus else 1.0,
            )
            for (name, is_plus), parameters in members.items()
        ]

    def _plus_ratio(self, part: str) -> float | None:
        is_denoiser = self.parts[part].module is self.denoiser
        return self.options.plus_ratio(is_denoiser=is_denoiser)

    def limit_weights(self) -> Mapping[str, Tensor]:
        """Shrink the deltas that are larger than ``scale_weight_norms`` allows."""
        limit = self.options.scale_weight_norms
        return {} if limit is None else limit_norms(self.layers.values(), limit)

    def state_dict(self) -> dict[str, Tensor]:
        """Give the tensors of every layer, as every client computes with them."""
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
