"""The contract of networks, checked on a tiny model."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

from sdxl_train.components import Network
from sdxl_train.errors import UserError
from sdxl_train.testing import network_files
from sdxl_train.testing.contract import Contract, untouched_process
from sdxl_train.testing.functions import normal
from sdxl_train.testing.predictions import Predictions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from sdxl_train.protocols import Adapter, LoadedModel
    from sdxl_train.testing.fixtures import TinyModel

_SPREAD = 0.3
"""Standard deviation of what a fresh network's parameters are moved by, to stand for training."""


class NetworkContract(Contract[Network]):
    """A network that starts as nothing, trains alone, and is in its file what it is in training."""

    model_options: ClassVar[Mapping[str, Any]] = {}
    """Options of the model that it is attached to."""
    whole_at: ClassVar[int] = 0
    """A timestep at which all of the network acts, as clients apply its file."""
    idle: ClassVar[tuple[str, ...]] = ()
    """Options of all networks that documentedly do nothing beside the options under test."""
    has_alpha: ClassVar[bool] = True
    """Whether its files have an ``alpha`` for each layer. Clients need it where there are factors;
    a format without any (whole differences, scalings) has none."""
    loads_in_diffusers: ClassVar[bool] = False
    """Whether it is claimed that diffusers reads its files."""

    def merged_weight(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Give a layer's weight with the network, from the tensors of its file alone.

        By the formulas of LoRA, LoHa and LoKr files; override it for another format.
        """
        return network_files.merged_weight(weight, tensors)

    def merged_bias(self, bias: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Give a layer's bias with the network likewise; networks of factors leave it alone."""
        return bias

    @pytest.fixture(scope="class")
    @classmethod
    def predictions(cls, tiny_model: TinyModel) -> Predictions:
        """A tiny model and what it is asked."""
        model = tiny_model.load(**cls.model_options)
        return Predictions(model, pixels=2 * tiny_model.family.bucket_multiple)

    @contextmanager
    def attached(self, model: LoadedModel, *, seed: int = 0, **changes: Any) -> Iterator[Adapter]:
        """Attach a fresh network for a while."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapter = self.make(**changes).build(model)
        try:
            yield adapter
        finally:
            adapter.detach()

    @contextmanager
    def trained(self, model: LoadedModel, **changes: Any) -> Iterator[Adapter]:
        """Attach a network whose parameters are no longer what they began as."""
        with self.attached(model, **changes) as adapter:
            with torch.no_grad():
                for number, parameter in enumerate(_parameters(adapter)):
                    parameter.add_(_SPREAD * normal(*parameter.shape, seed=number))
            yield adapter

    def predict(self, predictions: Predictions, adapter: Adapter) -> Tensor:
        """Give what the model predicts while it trains, with all of the network."""
        return predictions.make(adapter, timestep=self.whole_at)

    def evaluate(self, predictions: Predictions, adapter: Adapter) -> Tensor:
        """Give what the model predicts outside of training, where nothing is drawn or dropped."""
        modules = list(adapter.modules())
        for module in modules:
            module.eval()
        with torch.no_grad():
            prediction = self.predict(predictions, adapter)
        for module in modules:
            module.train()
        return prediction

    @torch.no_grad()
    def test_fresh_network_changes_nothing(self, predictions: Predictions) -> None:
        """Training starts from the base model."""
        before = predictions.make(timestep=self.whole_at)
        with self.attached(predictions.model) as adapter:
            after = self.evaluate(predictions, adapter)
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_trained_network_changes_the_prediction(self, predictions: Predictions) -> None:
        """What trains has an effect."""
        before = predictions.make(timestep=self.whole_at)
        with self.trained(predictions.model) as adapter:
            after = self.evaluate(predictions, adapter)
        assert torch.isfinite(after).all()
        assert (after - before).abs().max().item() > 1e-3, "its parameters have no effect"

    def test_only_its_own_parameters_train(self, predictions: Predictions) -> None:
        """Its parameters are fp32 leaves, each in one group; those of the model stay frozen."""
        model = predictions.model
        frozen = {id(p): p for module in _modules(model) for p in module.parameters()}
        with self.attached(model) as adapter:
            parameters = _parameters(adapter)
            assert parameters, "nothing would train"
            ids = [id(parameter) for parameter in parameters]
            assert len(ids) == len(set(ids)), "a parameter is in two groups"
            assert not set(ids) & frozen.keys(), "a parameter of the model is in a group"
            for parameter in parameters:
                assert parameter.requires_grad, "a parameter in a group does not train"
                assert parameter.is_leaf
                assert parameter.dtype == torch.float32, f"a parameter is {parameter.dtype}"
            trains = [p for p in frozen.values() if p.requires_grad]
            assert not trains, "parameters of the model train too"
            strangers = [
                p
                for module in _modules(model)
                for p in module.parameters()
                if p.requires_grad and id(p) not in set(ids)
            ]
            assert not strangers, "parameters train that are in no group"

    def test_groups_are_those_of_the_parts(self, predictions: Predictions) -> None:
        """Each group belongs to one of the parts that train; all of these are adapted."""
        model = predictions.model
        with self.attached(model) as adapter:
            groups = adapter.groups()
        names = {part.name for part in model.parts}
        assert {group.part for group in groups} <= names, "a group is of no part that trains"
        keys = [(group.part, group.name) for group in groups]
        assert len(keys) == len(set(keys)), "two groups of a part have one name"

    def test_every_group_gets_a_gradient(self, predictions: Predictions) -> None:
        """The loss reaches each group, in finite numbers, and nothing else."""
        with self.trained(predictions.model) as adapter, torch.enable_grad():
            torch.autograd.backward(self.predict(predictions, adapter).square().mean())
            for group in adapter.groups():
                gradients = [p.grad for p in group.parameters if p.grad is not None]
                name = f"group {group.name} of {group.part}"
                assert all(torch.isfinite(g).all() for g in gradients), f"{name}: not finite"
                assert any(g.abs().max() > 0 for g in gradients), f"{name} gets no gradient"
        for module in _modules(predictions.model):
            for parameter in module.parameters():
                assert parameter.grad is None, "a parameter of the model gets a gradient"

    @torch.no_grad()
    def test_detach_gives_the_model_back(self, predictions: Predictions) -> None:
        """After ``detach`` the model is the one that was given, bit for bit."""
        model = predictions.model
        before, structure = predictions.make(), _structure(model)
        with self.trained(model) as adapter:
            self.predict(predictions, adapter)
        assert _structure(model) == structure, "modules or their forward stay replaced"
        assert torch.equal(predictions.make(), before), "it leaves something behind"

    @torch.no_grad()
    def test_saved_network_loads_exactly(self, predictions: Predictions, tmp_path: Path) -> None:
        """A file gives the same tensors and the same predictions, bit for bit."""
        model = predictions.model
        with self.trained(model) as adapter:
            saved = _through_a_file(adapter, tmp_path)
            expected = self.evaluate(predictions, adapter)
        with self.attached(model, seed=1) as adapter:
            adapter.load_state_dict(saved)
            again = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
            assert again.keys() == saved.keys()
            for name, tensor in saved.items():
                assert torch.equal(again[name], tensor), f"{name} is not what was loaded"
            assert torch.equal(self.evaluate(predictions, adapter), expected)

    def test_other_files_are_refused(self, predictions: Predictions) -> None:
        """A missing or unknown key, or another shape, is the user's mistake, and named."""
        with self.attached(predictions.model) as adapter:
            state = dict(adapter.state_dict())
            name = max(state, key=lambda key: state[key].numel())
            wrong: dict[str, Mapping[str, Tensor]] = {
                "a missing key": {key: state[key] for key in state if key != name},
                "an unknown key": {**state, "no_layer.weight": torch.zeros(1)},
                "another shape": {**state, name: torch.zeros(*state[name].shape, 2)},
            }
            for what, tensors in wrong.items():
                try:
                    adapter.load_state_dict(tensors)
                except UserError:
                    continue
                pytest.fail(f"{what} passes without a UserError")

    def test_keys_conform(self, predictions: Predictions) -> None:
        """Keys are ``PREFIX_LAYER.tensor`` with the names of the model's parts, and an alpha."""
        model = predictions.model
        names = {
            f"{part.prefix}_{name}" for part in model.parts for name in part.file_names.values()
        }
        with self.attached(model) as adapter:
            state = adapter.state_dict()
        strange = [key for key in state if key.partition(".")[0] not in names]
        assert not strange, f"keys of no layer of the model: {', '.join(strange[:3])}"
        layers = {key.partition(".")[0] for key in state}
        silent = sorted(layer for layer in layers if f"{layer}.alpha" not in state)
        if self.has_alpha:
            assert not silent, f"layers without an alpha: {', '.join(silent[:3])}"

    @torch.no_grad()
    def test_file_says_what_the_forward_does(
        self, predictions: Predictions, tmp_path: Path
    ) -> None:
        """Merging the file into the weights predicts the same as the live network."""
        model = predictions.model
        with self.trained(model) as adapter:
            tensors = _through_a_file(adapter, tmp_path)
            live = self.evaluate(predictions, adapter)
        with _merged(model, tensors, weight=self.merged_weight, bias=self.merged_bias):
            merged = predictions.make(timestep=self.whole_at)
        _assert_alike(merged, live)

    def test_metadata_is_text(self, predictions: Predictions) -> None:
        """What it says of itself fits the header of a file."""
        with self.attached(predictions.model) as adapter:
            metadata = adapter.metadata()
        for name, value in metadata.items():
            assert isinstance(name, str)
            assert isinstance(value, str), f"{name} is a {type(value).__name__}, not text"

    def test_plan_needs_no_weights(self, tiny_model: TinyModel, predictions: Predictions) -> None:
        """On the meta device it has the same tensors and groups, for ``sdxl-train plan``."""
        with self.attached(tiny_model.load("meta", **self.model_options)) as planned:
            shapes = {name: t.shape for name, t in planned.state_dict().items()}
            groups = [(g.part, g.name, len(g.parameters)) for g in planned.groups()]
        with self.attached(predictions.model) as real:
            assert shapes == {name: t.shape for name, t in real.state_dict().items()}
            assert groups == [(g.part, g.name, len(g.parameters)) for g in real.groups()]

    def test_same_seed_gives_the_same_network(self, predictions: Predictions) -> None:
        """All randomness of its start is that of the global generator, which the run seeds."""
        states = []
        for _ in range(2):
            with self.attached(predictions.model, seed=5) as adapter:
                states.append({name: t.clone() for name, t in adapter.state_dict().items()})
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    def test_process_is_left_alone(self, predictions: Predictions) -> None:
        """Apart from drawing its start, it changes nothing that others rely on."""
        with untouched_process(draws=True):
            adapter = self.make().build(predictions.model)
            try:
                with untouched_process():
                    self.evaluate(predictions, adapter)
            finally:
                adapter.detach()

    @pytest.mark.parametrize(
        ("option", "values"),
        [("network_dim", (2, 3)), ("network_alpha", (1.0, 3.0)), ("network_dropout", (None, 0.9))],
    )
    def test_options_of_all_networks_act_or_are_refused(
        self, predictions: Predictions, option: str, values: tuple[Any, Any]
    ) -> None:
        """Rank, alpha and dropout make a difference in training, or the run refuses them."""
        if any(self.refusals(**{option: value}) for value in values if value is not None):
            return
        seen = []
        for value in values:
            with self.trained(predictions.model, **{option: value}) as adapter:
                shapes = [t.shape for t in adapter.state_dict().values()]
                torch.manual_seed(0)
                with torch.enable_grad():
                    seen.append((shapes, self.predict(predictions, adapter).detach()))
        (shapes, one), (others, two) = seen
        acts = shapes != others or not torch.equal(one, two)
        assert acts == (option not in self.idle), f"{option} has {'an' if acts else 'no'} effect"

    @torch.no_grad()
    def test_file_loads_in_diffusers_where_claimed(
        self, tiny_model: TinyModel, predictions: Predictions, tmp_path: Path
    ) -> None:
        """A diffusers pipeline with the file predicts the same as the live network."""
        if not self.loads_in_diffusers:
            return
        with self.trained(predictions.model) as adapter:
            _through_a_file(adapter, tmp_path)
            live = self.evaluate(predictions, adapter)
        fused = tiny_model.load(**self.model_options)
        _fuse_by_diffusers(fused, tiny_model.path, tmp_path)
        _assert_alike(predictions.on(fused).make(timestep=self.whole_at), live)


_FILE = "network.safetensors"


def _parameters(adapter: Adapter) -> list[nn.Parameter]:
    return [parameter for group in adapter.groups() for parameter in group.parameters]


def _modules(model: LoadedModel) -> list[nn.Module]:
    return [part.module for part in (*model.parts, *model.frozen_parts)]


def _structure(model: LoadedModel) -> list[object]:
    """Give what an adapter may have replaced: modules, their forward, hooks and parameters."""
    return [
        (
            path,
            id(module),
            id(vars(module).get("forward")),
            [(name, id(p), p.requires_grad) for name, p in module.named_parameters(recurse=False)],
            len(module._forward_hooks) + len(module._forward_pre_hooks),
        )
        for root in _modules(model)
        for path, module in root.named_modules()
    ]


def _through_a_file(adapter: Adapter, folder: Path) -> dict[str, Tensor]:
    """Save the network as a run does, and read the file."""
    from safetensors.torch import load_file, save_file

    state = {name: tensor.contiguous() for name, tensor in adapter.state_dict().items()}
    path = folder / _FILE
    save_file(state, path, metadata=adapter.metadata())
    return load_file(path)


@contextmanager
def _merged(
    model: LoadedModel,
    tensors: Mapping[str, Tensor],
    **merges: Callable[[Tensor, Mapping[str, Tensor]], Tensor],
) -> Iterator[None]:
    """Put the parameters with a file merged in for those of the model, for a while.

    ``merges`` are by the parameter's name: ``weight``, ``bias``.
    """
    by_layer: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, name = key.partition(".")
        by_layer.setdefault(layer, {})[name] = tensor
    own: list[tuple[Any, Tensor]] = []
    for part in model.parts:
        for path, name in part.file_names.items():
            mine = by_layer.pop(f"{part.prefix}_{name}", None)
            for kind, merge in merges.items():
                parameter: Any = getattr(part.module.get_submodule(path), kind, None)
                if mine is not None and parameter is not None:
                    own.append((parameter, parameter.data))
                    parameter.data = merge(parameter.data, mine)
    try:
        assert not by_layer, f"the file has layers that the model has not: {list(by_layer)[:3]}"
        yield
    finally:
        for parameter, data in own:
            parameter.data = data


def _fuse_by_diffusers(model: LoadedModel, base: Path, folder: Path) -> None:
    """Give the model's parts the weights that a diffusers pipeline makes of base and file."""
    pytest.importorskip("peft", reason="diffusers needs peft to read networks")
    from diffusers import DiffusionPipeline

    model.encode_text([""])  # or encoders that wait to be needed would have no weights yet
    pipeline: Any = DiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(folder, weight_name=_FILE)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    loaded = [part for part in pipeline.components.values() if hasattr(part, "state_dict")]
    for part in (*model.parts, *model.frozen_parts):
        fused = [other for other in loaded if type(other) is type(part.module)]
        assert len(fused) == 1, f"the pipeline has {len(fused)} parts like {part.title}"
        part.module.load_state_dict(fused[0].state_dict())


def _assert_alike(one: Tensor, two: Tensor) -> None:
    """Compare predictions that took other ways through fp32."""
    scale = two.abs().max().item()
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4 * max(1.0, scale))
