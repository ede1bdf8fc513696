"""LoRA on a tiny SDXL: what it changes, what trains, what it saves and takes back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from sdxl_lora_plugins.networks import Lora
from sdxl_train import UserError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from sdxl_lora_plugins.networks.lora import LoraAdapter
    from sdxl_train.ldm.loaded import LoadedLdm

CAPTIONS = ["a tabby cat", "a rocket at night"]


@pytest.fixture
def model(tiny_file: Path, load_sdxl: Callable[..., LoadedLdm]) -> LoadedLdm:
    """A model of one's own: networks change it."""
    return load_sdxl(tiny_file)


@pytest.fixture
def outputs(
    sizes: Callable[[int], dict[str, Tensor]],
) -> Callable[[LoadedLdm], dict[str, Tensor]]:
    """Ask text encoders and U-Net for what they make of fixed inputs."""
    noisy = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([20, 900])

    def ask(model: LoadedLdm) -> dict[str, Tensor]:
        text = model.encode_text(CAPTIONS)
        prediction = model.predict(noisy, timesteps, {**text, **sizes(2)})
        return {**text, "prediction": prediction}

    return ask


def build(model: LoadedLdm, *, seed: int = 0, **options: Any) -> LoraAdapter:
    torch.manual_seed(seed)
    adapter: Any = Lora(**options).build(model)
    lora: LoraAdapter = adapter
    return lora


def randomize(adapter: LoraAdapter, seed: int = 1) -> dict[str, Tensor]:
    """Give every factor values as training would; return the state."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapter.state_dict().values():
        if tensor.ndim:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return {name: tensor.clone() for name, tensor in adapter.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def parameters(adapter: LoraAdapter) -> list[torch.nn.Parameter]:
    return [parameter for group in adapter.groups() for parameter in group.parameters]


def base_weights(model: LoadedLdm) -> dict[str, Tensor]:
    return {
        f"{part.name}.{name}": tensor.clone()
        for part in model.parts
        for name, tensor in part.module.state_dict().items()
    }


def test_fresh_network_changes_nothing(
    model: LoadedLdm, outputs: Callable[[LoadedLdm], dict[str, Tensor]]
) -> None:
    with torch.no_grad():
        before = outputs(model)
        adapter = build(model, network_dim=4)
        assert same(outputs(model), before)
        randomize(adapter)
        changed = outputs(model)
    assert all(not torch.equal(changed[name], before[name]) for name in before)


def test_detach_gives_the_model_back_bit_for_bit(
    model: LoadedLdm, outputs: Callable[[LoadedLdm], dict[str, Tensor]]
) -> None:
    weights = base_weights(model)
    with torch.no_grad():
        before = outputs(model)
        adapter = build(model, network_dim=4)
        randomize(adapter)
        outputs(model)
        adapter.detach()
        assert same(outputs(model), before)
    assert same(base_weights(model), weights)
    assert not [m for p in model.parts for m in p.module.modules() if "forward" in vars(m)]


def test_only_the_network_trains_and_all_of_it(
    model: LoadedLdm, outputs: Callable[[LoadedLdm], dict[str, Tensor]]
) -> None:
    adapter = build(model, network_dim=4)
    randomize(adapter)
    torch.autograd.backward(outputs(model)["prediction"].square().mean())
    assert not [p for part in model.parts for p in part.module.parameters() if p.requires_grad]
    without = {
        name
        for name, layer in adapter.layers.items()
        for parameter in layer.parameters()
        if parameter.grad is None or not parameter.grad.any()
    }
    # SDXL uses the second-to-last layer of text encoder 1: the last has no path to the output.
    last = max(name for name in adapter.layers if name.startswith("lora_te1_"))
    stem = last[: last.index("layers_") + len("layers_1")]
    assert without == {name for name in adapter.layers if name.startswith(stem)}


def test_groups_hold_every_parameter_once(model: LoadedLdm) -> None:
    adapter = build(model, network_dim=4)
    held = [id(parameter) for parameter in parameters(adapter)]
    assert len(held) == len(set(held)) == 2 * len(adapter.layers)
    assert [(g.part, g.name) for g in adapter.groups()] == [
        ("unet", "unet"),
        ("te1", "textencoder"),
        ("te2", "textencoder"),
    ]


def test_parts_that_do_not_train_stay_untouched(
    tiny_file: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    for options, prefixes in (
        ({"network_train_unet_only": True}, {"lora_unet"}),
        ({"network_train_text_encoder_only": True}, {"lora_te1", "lora_te2"}),
        ({"text_encoder_lr1": 0}, {"lora_unet", "lora_te2"}),
        ({"unet_lr": 0}, {"lora_te1", "lora_te2"}),
    ):
        model = load_sdxl(tiny_file, "meta", **options)
        adapter = build(model, network_dim=4)
        found = {name.split("_")[0] + "_" + name.split("_")[1] for name in adapter.layers}
        assert found == prefixes
        for part in model.frozen_parts:
            assert not [m for m in part.module.modules() if "forward" in vars(m)]


def test_initial_factors_follow_kaiming_and_zero(model: LoadedLdm) -> None:
    adapter = build(model, network_dim=4)
    for layer in adapter.layers.values():
        down, up = layer.lora_down.weight.detach(), layer.lora_up.weight
        assert not up.any()
        # He et al. 2015 with a = sqrt(5): uniform within 1 / sqrt(fan in).
        bound = down[0].numel() ** -0.5
        assert 0.5 * bound < float(down.abs().max()) <= bound
        assert down.dtype == up.dtype == torch.float32


def test_same_seed_gives_the_same_network(
    model: LoadedLdm, tiny_file: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    first = build(model, seed=5).state_dict()
    assert same(first, build(load_sdxl(tiny_file), seed=5).state_dict())
    assert not same(first, build(load_sdxl(tiny_file), seed=6).state_dict())


@pytest.mark.parametrize(
    ("options", "rank", "alpha"),
    [
        ({}, 4, 1.0),
        ({"network_dim": 8}, 8, 1.0),
        ({"network_dim": 8, "network_alpha": 0}, 8, 8.0),
        ({"network_dim": 2, "network_alpha": 0.5}, 2, 0.5),
    ],
)
def test_rank_and_alpha_have_the_ecosystems_defaults(
    options: dict[str, Any],
    rank: int,
    alpha: float,
    tiny_file: Path,
    load_sdxl: Callable[..., LoadedLdm],
) -> None:
    adapter = build(load_sdxl(tiny_file, "meta"), **options)
    state = adapter.state_dict()
    assert {tensor.item() for name, tensor in state.items() if name.endswith("alpha")} == {alpha}
    assert {t.shape[0] for name, t in state.items() if "lora_down" in name} == {rank}
    assert {layer.scale for layer in adapter.layers.values()} == {alpha / rank}
    assert adapter.metadata() == {"ss_network_dim": str(rank), "ss_network_alpha": str(alpha)}


def test_state_goes_there_and_back(
    model: LoadedLdm,
    outputs: Callable[[LoadedLdm], dict[str, Tensor]],
    tiny_file: Path,
    load_sdxl: Callable[..., LoadedLdm],
) -> None:
    adapter = build(model, network_dim=4, network_alpha=2)
    state = randomize(adapter)
    other = load_sdxl(tiny_file)
    receiver = build(other, seed=9, network_dim=4, network_alpha=2)
    receiver.load_state_dict({name: tensor.half().float() for name, tensor in state.items()})
    receiver.load_state_dict(state)
    assert same(receiver.state_dict(), state)
    with torch.no_grad():
        assert same(outputs(other), outputs(model))


def test_state_that_does_not_fit_is_refused_whole(
    tiny_file: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    adapter = build(load_sdxl(tiny_file), network_dim=4)
    state = {name: tensor.clone() + 1 for name, tensor in adapter.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    for name in [name for name in state if name.endswith("alpha")]:
        state[name] = before[name]
    first = sorted(state)[1]
    shape = [*state[first].shape]
    wrong: dict[str, dict[str, Tensor]] = {
        "1 keys are missing": {name: t for name, t in state.items() if name != first},
        "1 keys are unknown": {**state, "lora_unet_other.alpha": torch.tensor(1.0)},
        f"expected {shape}": {**state, first: torch.zeros(8, 3)},
        "is 2, expected 1": {**state, sorted(state)[0]: torch.tensor(2.0)},
    }
    for message, content in wrong.items():
        with pytest.raises(UserError) as caught:
            adapter.load_state_dict(content)
        assert message in str(caught.value)
        assert same(adapter.state_dict(), before)


def test_dropout_acts_while_training_only(
    model: LoadedLdm, outputs: Callable[[LoadedLdm], dict[str, Tensor]]
) -> None:
    randomize(build(model, network_dim=4, network_dropout=0.5))
    torch.manual_seed(1)
    first = outputs(model)["prediction"]
    assert not torch.equal(outputs(model)["prediction"], first)
    torch.manual_seed(1)
    assert torch.equal(outputs(model)["prediction"], first)
    with torch.no_grad():
        assert same(outputs(model), outputs(model))


def test_dropout_drops_its_share_and_scales_the_rest(model: LoadedLdm) -> None:
    adapter = build(model, network_dim=4, network_dropout=0.25, network_alpha=4)
    layer = next(iter(adapter.layers.values()))
    x = torch.randn(1000, layer.lora_down.in_features)  # type: ignore[arg-type]
    base = layer._base_forward(x)
    with torch.no_grad():
        layer.lora_up.weight.fill_(0)
        layer.lora_up.weight[:4] = torch.eye(4)
    low = (layer(x) - base)[:, :4].detach()
    full = layer.lora_down(x).detach()
    dropped = low.abs() < 1e-5
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.04)
    torch.testing.assert_close(low[~dropped], full[~dropped] / 0.75, rtol=1e-3, atol=1e-5)


def test_multiplier_is_the_strength_that_clients_apply(
    tiny_file: Path,
    load_sdxl: Callable[..., LoadedLdm],
    outputs: Callable[[LoadedLdm], dict[str, Tensor]],
) -> None:
    given = []
    # A client at strength 1/2 computes with half the alpha.
    for alpha, multiplier in ((3.0, 0.5), (1.5, 1.0), (1.5, 0.0)):
        model = load_sdxl(tiny_file)
        adapter = build(model, network_alpha=alpha)
        randomize(adapter)
        adapter.multiplier = multiplier
        with torch.no_grad():
            given.append(outputs(model))
    halved, expected, bare = given
    assert all(torch.allclose(halved[n], expected[n], atol=1e-4) for n in halved)
    with torch.no_grad():
        assert same(bare, outputs(load_sdxl(tiny_file)))
