"""LoRA, LoCon and LoKr on a tiny SDXL: what a file says is what the network does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from sdxl_lora_plugins.networks import Locon, Lokr, Lora
from sdxl_train import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    from sdxl_lora_plugins.networks.adapter import AdaptedLayer, LayerAdapter
    from sdxl_train.ldm.loaded import LoadedLdm

NETWORKS: dict[str, tuple[type[Lora] | type[Lokr], dict[str, Any]]] = {
    "lora": (Lora, {"network_alpha": 3}),
    "lora rs": (Lora, {"rs_lora": True, "network_alpha": 2}),
    "locon": (Locon, {"conv_dim": 2, "conv_alpha": 0.5}),
    "locon rs dora": (Locon, {"rs_lora": True, "dora_wd": True}),
    "dora": (Lora, {"dora_wd": True, "network_alpha": 0}),
    "blocks": (
        Lora,
        {
            "block_dims": [*range(1, 24)],
            "block_alphas": [1.5] * 23,
            "conv_block_dims": [3, 0] * 11 + [3],
            "conv_block_alphas": [*range(23)],
        },
    ),
    "rates": (Locon, {"down_lr_weight": "cosine", "loraplus_lr_ratio": 4}),
    "lokr": (Lokr, {"network_dim": 2, "network_alpha": 3}),
    "lokr factor": (Lokr, {"network_dim": 1, "factor": 4, "conv_dim": 2, "conv_alpha": 1}),
    "lokr both": (Lokr, {"network_dim": 1, "factor": 8, "decompose_both": True}),
    "lokr full": (Lokr, {"full_matrix": True, "network_alpha": 3}),
    "lokr high": (Lokr, {"network_dim": 1000}),
    "lokr linear": (Lokr, {"conv_dim": 0, "block_dims": [0, 1] * 11 + [2]}),
}
every_network = pytest.mark.parametrize("name", list(NETWORKS))


@pytest.fixture
def model(tiny_file: Path, load_sdxl: Callable[..., LoadedLdm]) -> LoadedLdm:
    return load_sdxl(tiny_file)


@pytest.fixture
def predict(
    sizes: Callable[[int], dict[str, Tensor]],
) -> Callable[[LoadedLdm], Tensor]:
    """Ask text encoders and U-Net about fixed inputs."""
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def ask(model: LoadedLdm) -> Tensor:
        text = model.encode_text(["a tabby cat", "a rocket"])
        return model.predict(noisy, torch.tensor([20, 900]), {**text, **sizes(2)})

    return ask


def attach(name: str, model: LoadedLdm, **options: Any) -> LayerAdapter:
    kind, own = NETWORKS[name]
    torch.manual_seed(0)
    return cast("LayerAdapter", kind(**{**own, **options}).build(model))


def train_somehow(adapter: LayerAdapter, seed: int = 1) -> None:
    """Move every parameter away from its start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for group in adapter.groups():
            for parameter in group.parameters:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def layers_of(model: LoadedLdm) -> dict[str, nn.Linear | nn.Conv2d]:
    return {
        f"{part.prefix}_{name}": cast("nn.Linear", part.module.get_submodule(path))
        for part in model.parts
        for path, name in part.file_names.items()
    }


def merged(weight: Tensor, keys: Mapping[str, Tensor]) -> Tensor:
    """Merge a layer's keys into its weight by the formulas that clients follow, in double."""
    keys = {name: tensor.double() for name, tensor in keys.items()}
    weight = weight.detach().double()
    if "lora_down.weight" in keys:
        down, up = keys["lora_down.weight"], keys["lora_up.weight"]
        delta = torch.tensordot(up.flatten(1), down, dims=1)
        delta *= keys["alpha"] / down.shape[0]
    else:
        factors, scale = [], torch.tensor(1.0)
        for name in ("lokr_w1", "lokr_w2"):
            if name in keys:
                factors.append(keys[name].flatten(1))
            else:
                factors.append(keys[f"{name}_a"] @ keys[f"{name}_b"])
                scale = keys["alpha"] / len(keys[f"{name}_b"])
        first, second = factors
        kernel = weight[0, 0].numel()
        blocks = second.reshape(len(second), -1, kernel)
        # Entry (i, j) by (k, l) of the product is first[i, k] times second[j, l].
        delta = first[:, None, :, None, None] * blocks[None, :, None, :, :] * scale
    weight = weight + delta.reshape(weight.shape)
    if "dora_scale" in keys:
        dims = [dim for dim in range(weight.ndim) if dim != 1]
        norm = torch.linalg.vector_norm(weight, dim=dims, keepdim=True)
        weight = weight * keys["dora_scale"] / norm
    return weight


def by_layer(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name, _, suffix = key.partition(".")
        layers.setdefault(name, {})[suffix] = tensor
    return layers


def with_weight(layer: nn.Linear | nn.Conv2d, weight: Tensor, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.double()
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding)


@every_network
def test_file_says_what_the_layer_does(name: str, model: LoadedLdm, tmp_path: Path) -> None:
    adapter = attach(name, model)
    train_somehow(adapter)
    layers = layers_of(model)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        saved = {key: t.to(dtype).contiguous() for key, t in adapter.state_dict().items()}
        save_file(saved, tmp_path / "net")
        tolerance = max(20 * torch.finfo(dtype).eps, 1e-5)
        for layer_name, keys in by_layer(load_file(tmp_path / "net")).items():
            layer = layers[layer_name]
            shape = [3, 5, layer.weight.shape[1]]
            if isinstance(layer, nn.Conv2d):
                shape = [2, layer.in_channels, 6, 4]
            x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
            with torch.no_grad():
                live = layer(x).double()
            told = with_weight(layer, merged(layer.weight, keys), x.double())
            assert float((live - told).norm() / told.norm()) < tolerance, layer_name


@every_network
def test_fresh_network_changes_nothing_and_detach_restores(
    name: str, model: LoadedLdm, predict: Callable[[LoadedLdm], Tensor]
) -> None:
    with torch.no_grad():
        before = predict(model)
        adapter = attach(name, model)
        assert torch.equal(predict(model), before)
        train_somehow(adapter)
        assert not torch.equal(predict(model), before)
        adapter.detach()
        assert torch.equal(predict(model), before)
    assert not [m for p in model.parts for m in p.module.modules() if "forward" in vars(m)]


@every_network
def test_saved_network_goes_on_as_it_was(
    name: str, model: LoadedLdm, predict: Callable[[LoadedLdm], Tensor]
) -> None:
    adapter = attach(name, model)
    train_somehow(adapter)
    state = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
    with torch.no_grad():
        expected = predict(model)
    train_somehow(adapter, seed=3)
    adapter.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(predict(model), expected, rtol=1e-5, atol=1e-5)
    for key, tensor in adapter.state_dict().items():
        torch.testing.assert_close(tensor, state[key], rtol=2e-7, atol=0)


@every_network
def test_only_factors_train_in_fp32_and_all_of_them_once(name: str, model: LoadedLdm) -> None:
    adapter = attach(name, model)
    frozen = {id(p) for part in model.parts for p in part.module.parameters()}
    held = [parameter for group in adapter.groups() for parameter in group.parameters]
    assert len(held) == len({id(parameter) for parameter in held})
    assert not frozen & {id(parameter) for parameter in held}
    tensors = [t for key, t in adapter.state_dict().items() if not key.endswith(".alpha")]
    assert sum(p.numel() for p in held) == sum(t.numel() for t in tensors)
    assert {p.dtype for p in held} == {torch.float32}


@every_network
def test_network_on_meta_has_the_same_shapes(
    name: str, model: LoadedLdm, tiny_file: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    planned = attach(name, load_sdxl(tiny_file, "meta")).state_dict()
    real = attach(name, model).state_dict()
    assert {k: t.shape for k, t in planned.items()} == {k: t.shape for k, t in real.items()}


@pytest.mark.parametrize("name", ["locon", "dora", "lokr", "lokr both"])
def test_gradients_reach_fp32_factors_under_bf16_weights(
    name: str,
    tiny_file: Path,
    load_sdxl: Callable[..., LoadedLdm],
    predict: Callable[[LoadedLdm], Tensor],
) -> None:
    model = load_sdxl(tiny_file, dtype=torch.bfloat16, network_train_unet_only=True)
    adapter = attach(name, model)
    train_somehow(adapter)
    with torch.autocast("cpu", torch.bfloat16):
        torch.autograd.backward(predict(model).square().mean())
    for layer in adapter.layers.values():
        for parameter in layer.parameters():
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.isfinite().all()
            assert parameter.grad.any()


@pytest.mark.parametrize("name", ["locon", "lokr", "dora"])
def test_network_is_never_affected_by_another(
    name: str, model: LoadedLdm, tiny_file: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    alone = list(attach("lora", load_sdxl(tiny_file, "meta")).state_dict())
    attach(name, model)
    assert list(attach("lora", load_sdxl(tiny_file, "meta")).state_dict()) == alone


def test_other_rank_or_scaling_is_refused(
    tiny_file: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    state = attach("lora", load_sdxl(tiny_file)).state_dict()
    for options in ({"rs_lora": True}, {"network_dim": 8}, {"dora_wd": True}):
        receiver = attach("lora", load_sdxl(tiny_file), **options)
        with pytest.raises(UserError):
            receiver.load_state_dict(state)


def a_layer(name: str, model: LoadedLdm, suffix: str, **options: Any) -> AdaptedLayer:
    adapter = attach(name, model, **options)
    train_somehow(adapter)
    return next(layer for key, layer in adapter.layers.items() if key.endswith(suffix))


@pytest.mark.parametrize("name", ["lora", "lokr"])
def test_module_dropout_leaves_layers_out_in_training_only(name: str, model: LoadedLdm) -> None:
    layer = a_layer(name, model, "attn1_to_q", module_dropout=0.3)
    x = torch.randn(2, 3, layer._base_forward.__self__.in_features)  # type: ignore[attr-defined]
    base = layer._base_forward(x)
    torch.manual_seed(0)
    skipped = sum(torch.equal(layer(x), base) for _ in range(400))
    assert skipped / 400 == pytest.approx(0.3, abs=0.07)
    with torch.no_grad():
        assert not any(torch.equal(layer(x), base) for _ in range(20))


@pytest.mark.parametrize("suffix", ["attn1_to_q", "in_layers_2", "emb_layers_1"])
def test_rank_dropout_drops_whole_ranks_of_a_sample(suffix: str, model: LoadedLdm) -> None:
    layer: Any = a_layer("locon", model, suffix, rank_dropout=0.25, conv_dim=4)
    base = layer._base_forward.__self__
    shape = {"attn1_to_q": [500, 6, -1], "in_layers_2": [500, -1, 3, 3], "emb_layers_1": [500, -1]}
    x = torch.randn([base.weight.shape[1] if n < 0 else n for n in shape[suffix]])
    low = layer.lora_down(x)
    ratio = (layer.dropped(low) / low).detach()
    values = ratio.unique()
    assert values.numel() <= 4
    torch.testing.assert_close(values.clamp(0, 4 / 3), values, rtol=1e-5, atol=1e-5)
    places = {"attn1_to_q": (slice(None), slice(0, 1)), "in_layers_2": (..., slice(1), slice(1))}
    ranks = ratio[places.get(suffix, ...)]
    torch.testing.assert_close(ranks.expand_as(ratio), ratio)
    assert float((ranks == 0).float().mean()) == pytest.approx(0.25, abs=0.05)
    with torch.no_grad():
        assert torch.equal(layer.dropped(low), low)


def test_rank_dropout_of_lokr_drops_whole_outputs(model: LoadedLdm) -> None:
    layer: Any = a_layer("lokr", model, "in_layers_2", rank_dropout=0.25)
    x = torch.randn(60, layer._base_forward.__self__.in_channels, 4, 4)
    delta = layer.delta(x).detach()
    dropped = (delta == 0).flatten(2).all(-1)
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.05)
    with torch.no_grad():
        full = layer.delta(x)
    torch.testing.assert_close(delta[~dropped], full[~dropped] / 0.75)


def test_dropout_is_the_same_with_gradient_checkpointing(
    tiny_file: Path, load_sdxl: Callable[..., LoadedLdm], predict: Callable[[LoadedLdm], Tensor]
) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = load_sdxl(
            tiny_file, gradient_checkpointing=checkpointing, network_train_unet_only=True
        )
        options = {"network_dropout": 0.2, "rank_dropout": 0.2, "module_dropout": 0.2}
        adapter = attach("lora", model, **options)
        train_somehow(adapter)
        torch.manual_seed(4)
        torch.autograd.backward(predict(model).square().mean())
        grads = [p.grad for group in adapter.groups() for p in group.parameters]
        gradients.append([torch.zeros(()) if grad is None else grad for grad in grads])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-4, atol=1e-6)
