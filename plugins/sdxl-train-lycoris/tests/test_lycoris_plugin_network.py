"""The adapter on a tiny SDXL: what it changes, what it saves, what it takes back."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_train import Part, UserError
from sdxl_train_lycoris.networks import Kohya

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sdxl_train import Adapter

DATA = Path(__file__).parent / "data"

UNET: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
TINY_UNET: dict[str, Any] = UNET | {
    "block_out_channels": (8, 16, 16),
    "transformer_layers_per_block": (1, 1, 1),
    "attention_head_dim": (1, 2, 2),
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 12 + 6 * 4,
}
TINY_TEXT: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 12,
    "intermediate_size": 24,
    "projection_dim": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "bos_token_id": 30,
    "eos_token_id": 31,
}
FULL_UNET: dict[str, Any] = UNET | {
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
FULL_TE1: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
FULL_TE2: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
}


@dataclass
class StandIn:
    """As much of a loaded model as a network looks at."""

    parts: tuple[Part, ...]
    denoiser: nn.Module

    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        """Give the output of the U-Net and of both text encoders for fixed inputs."""
        return self.run()

    def run(self) -> list[Tensor]:
        """Give the same with their graph."""
        generator = torch.Generator().manual_seed(0)
        unet, te1, te2 = (part.module for part in self.parts)
        latents = torch.randn(1, 4, 8, 8, generator=generator)
        context = torch.randn(1, 5, 12, generator=generator)
        added = {"text_embeds": torch.ones(1, 12), "time_ids": torch.ones(1, 6)}
        tokens = torch.tensor([[30, 1, 2, 3, 31]])
        return [
            unet(latents, torch.tensor([7]), context, added_cond_kwargs=added).sample,
            te1(tokens).last_hidden_state,
            te2(tokens).text_embeds,
        ]


def sgm_name(path: str) -> str:
    """Name a layer of diffusers' SDXL U-Net by interop.md's index rule, for two layers a block."""

    def block(match: re.Match[str]) -> str:
        side, i, kind, j = match[1], int(match[2]), match[3], int(match[4])
        first = 1 if side == "down" else 0
        stem = f"{'input' if side == 'down' else 'output'}_blocks"
        if kind == "resnets":
            return f"{stem}.{first + 3 * i + j}.0."
        if kind == "attentions":
            return f"{stem}.{first + 3 * i + j}.1."
        return f"input_blocks.{3 * (i + 1)}.0." if side == "down" else f"{stem}.{3 * i + 2}.2."

    path = re.sub(r"^(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.", block, path)
    path = path.replace("mid_block.resnets.0", "middle_block.0")
    path = path.replace("mid_block.attentions.0", "middle_block.1")
    path = path.replace("mid_block.resnets.1", "middle_block.2")
    if path.startswith("input_blocks.") and path.endswith(".0.conv"):
        path = path.removesuffix("conv") + "op"
    for old, new in {
        "conv1": "in_layers.2",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
        "conv_in": "input_blocks.0.0",
    }.items():
        path = path.replace(old, new)
    return path.replace(".", "_")


def part_of(name: str, module: nn.Module) -> Part:
    """Describe a part as the SDXL model does."""
    paths = [p for p, m in module.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    if name == "unet":
        file_names = {path: sgm_name(path) for path in paths}
    else:
        file_names = {
            path: f"text_model_{path.removeprefix('text_model.').replace('.', '_')}"
            for path in paths
        }
    return Part(
        name=name,
        title=name,
        group="unet" if name == "unet" else "textencoder",
        prefix=f"lora_{name}",
        module=module,
        lr=None if name == "unet" else 1e-5,
        file_names=file_names,
    )


def make_model(unet: Mapping[str, Any], *texts: Mapping[str, Any]) -> StandIn:
    """Build a stand-in on the default device."""
    te1, te2 = (CLIPTextConfig(**text) for text in texts)
    denoiser = UNet2DConditionModel(**unet)
    modules = {
        "unet": denoiser,
        "te1": CLIPTextModel(te1),
        "te2": CLIPTextModelWithProjection(te2),
    }
    for module in modules.values():
        module.requires_grad_(requires_grad=False).eval()
    return StandIn(
        parts=tuple(part_of(name, module) for name, module in modules.items()), denoiser=denoiser
    )


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Keep tiny operations from waiting for threads of their own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model() -> StandIn:
    """Give a tiny model."""
    torch.manual_seed(1)
    return make_model(TINY_UNET, TINY_TEXT, TINY_TEXT)


def attach(model: StandIn, seed: int = 2, **options: Any) -> Adapter:
    """Attach a network of rank 2 and alpha 1, unless the options say otherwise."""
    torch.manual_seed(seed)
    network = Kohya(**({"network_dim": 2, "network_alpha": 1.0} | options))
    assert not list(network.faults())
    return network.build(model)  # type: ignore[arg-type]


def perturb(adapter: Adapter, seed: int = 3) -> None:
    """Move every parameter, so that no factor is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for group in adapter.groups():
            for parameter in group.parameters:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * noise)


def layers_of(model: StandIn) -> dict[str, nn.Linear | nn.Conv2d]:
    """Give every adaptable layer by its name in files."""
    return {
        f"{part.prefix}_{name}": part.module.get_submodule(path)  # type: ignore[misc]
        for part in model.parts
        for path, name in part.file_names.items()
    }


def low_rank(keys: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Give up @ down, with the kernel's own factor between them for Tucker."""
    down, up = keys["lora_down.weight"], keys["lora_up.weight"]
    if "lora_mid.weight" in keys:
        weight = torch.einsum("ortu,rsvw,situ->oivw", up, keys["lora_mid.weight"], down)
    elif down.ndim == 4:
        weight = torch.einsum("ortu,rivw->oivw", up, down)
    else:
        weight = up @ down
    return weight, len(down)


def hadamard(keys: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Give (w1_a w1_b) * (w2_a w2_b), each through its kernel for Tucker."""
    if "hada_t1" in keys:
        halves = [
            torch.einsum(
                "rsvw,ro,si->oivw", keys[f"hada_t{n}"], keys[f"hada_w{n}_a"], keys[f"hada_w{n}_b"]
            )
            for n in (1, 2)
        ]
    else:
        halves = [keys[f"hada_w{n}_a"] @ keys[f"hada_w{n}_b"] for n in (1, 2)]
    return halves[0] * halves[1], len(keys["hada_w1_b"])


def kronecker(keys: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Give w1 (x) w2 with the output index (i, j) and the input index (k, l), as numpy has it."""
    rank = 1
    factors = []
    for name in ("lokr_w1", "lokr_w2"):
        if name in keys:
            factors.append(keys[name])
        else:
            factors.append(keys[f"{name}_a"] @ keys[f"{name}_b"])
            rank = len(keys[f"{name}_b"])
    first, second = factors
    flat = second.flatten(1)
    rows, columns = len(first) * len(second), -1
    if second.ndim == 2 and "kernel" in keys:
        kernel = [int(size) for size in keys["kernel"]]
        second = flat.view(len(second), -1, *kernel)
    product = torch.einsum("ik,jl...->ijkl...", first, second)
    return product.reshape(rows, columns, *second.shape[2:]), rank


FORMULAS = {"lora": low_rank, "locon": low_rank, "loha": hadamard, "lokr": kronecker}


def merged_weights(model: StandIn, state: Mapping[str, Tensor], algo: str) -> dict[str, Tensor]:
    """Merge a file into the model's weights: W + alpha/rank * delta, then DoRA if it is there."""
    by_layer: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name, _, suffix = key.partition(".")
        by_layer.setdefault(name, {})[suffix] = tensor
    layers, merged = layers_of(model), {}
    for name, keys in by_layer.items():
        layer = layers[name]
        if isinstance(layer, nn.Conv2d):
            keys["kernel"] = torch.tensor(layer.kernel_size)
        delta, rank = FORMULAS[algo](keys)
        weight = layer.weight + keys["alpha"] / rank * delta.reshape(layer.weight.shape)
        if "dora_scale" in keys:
            scale = keys["dora_scale"]
            dims = [dim for dim in range(weight.ndim) if scale.shape[dim] == 1]
            weight = weight * scale / torch.linalg.vector_norm(weight, dim=dims, keepdim=True)
        merged[name] = weight
    return merged


def outputs_with(model: StandIn, weights: Mapping[str, Tensor]) -> list[Tensor]:
    """Give the outputs of the bare model with other weights."""
    layers = layers_of(model)
    kept = {name: layers[name].weight.detach().clone() for name in weights}
    with torch.no_grad():
        for name, weight in weights.items():
            layers[name].weight.copy_(weight)
        outputs = model.outputs()
        for name, weight in kept.items():
            layers[name].weight.copy_(weight)
    return outputs


VARIANTS = [
    {"algo": "lora"},
    {"algo": "lora", "bypass_mode": False},
    {"algo": "locon", "conv_dim": 3, "conv_alpha": 2.0, "rs_lora": True},
    {"algo": "locon", "use_tucker": True, "use_scalar": True},
    {"algo": "locon", "dora_wd": True},
    {"algo": "locon", "dora_wd": True, "wd_on_output": True, "use_scalar": True},
    {"algo": "loha", "network_dim": 3, "use_scalar": True},
    {"algo": "loha", "use_tucker": True, "bypass_mode": True, "rs_lora": True},
    {"algo": "loha", "weight_decompose": True},
    {"algo": "lokr", "network_dim": 1, "network_alpha": 2.0},
    {"algo": "lokr", "bypass_mode": False, "use_scalar": True, "rs_lora": True},
    {"algo": "lokr", "network_dim": 1, "factor": 4, "decompose_both": True},
    {"algo": "lokr", "network_dim": 100000, "factor": 2, "rs_lora": True},
    {"algo": "lokr", "full_matrix": True, "bypass_mode": True, "unbalanced_factorization": True},
    {"algo": "lokr", "dora_wd": True, "network_alpha": 3.0},
]

SOME = [VARIANTS[number] for number in (3, 5, 6, 10, 11, 12)]


def ids(options: Mapping[str, Any]) -> str:
    """Name a variant by its options."""
    return " ".join(f"{name}={value}" for name, value in options.items())


@pytest.mark.parametrize("options", VARIANTS, ids=ids)
def test_fresh_network_changes_nothing(model: StandIn, options: Any) -> None:
    before = model.outputs()
    attach(model, **options)
    for old, new in zip(before, model.outputs(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("options", VARIANTS, ids=ids)
def test_saved_file_equals_live_forward(model: StandIn, options: Any) -> None:
    adapter = attach(model, **options)
    before = model.outputs()
    perturb(adapter)
    live = model.outputs()
    state = adapter.state_dict()
    adapter.detach()
    merged = merged_weights(model, state, options["algo"])
    expected = outputs_with(model, merged)
    for old, new, target in zip(before, live, expected, strict=True):
        assert (new - old).abs().max() > 1e-3
        torch.testing.assert_close(new, target, rtol=1e-4, atol=2e-5)
    assert merged.keys() == {key.partition(".")[0] for key in state}
    assert all(f"{name}.alpha" in state for name in merged)


def test_full_size_files_have_the_golden_keys() -> None:
    with torch.device("meta"):
        full = make_model(FULL_UNET, FULL_TE1, FULL_TE2)
    for algo, preset in (("locon", "attn-mlp"), ("loha", "full"), ("lokr", "full")):
        packed = (DATA / f"keys_lycoris_{algo}_{preset}.json.gz").read_bytes()
        golden = json.loads(gzip.decompress(packed))
        adapter = attach(full, algo=algo, preset=preset, network_dim=4)
        state = adapter.state_dict()
        adapter.detach()
        assert {key: list(tensor.shape) for key, tensor in state.items()} == {
            key: entry["shape"] for key, entry in golden.items()
        }
        # LyCORIS writes alpha 1 for all; clients agree about LoHa and LoKr where it is the rank.
        alpha = 1.0 if algo == "locon" else 4.0
        assert {t.item() for key, t in state.items() if key.endswith(".alpha")} == {alpha}


@pytest.mark.parametrize("options", SOME, ids=ids)
def test_loading_is_the_inverse_of_saving(model: StandIn, options: Any) -> None:
    adapter = attach(model, **options)
    perturb(adapter)
    state = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
    adapter.detach()
    loaded = attach(model, seed=9, **options)
    loaded.load_state_dict(state)
    again = loaded.state_dict()
    assert again.keys() == state.keys()
    for key, tensor in state.items():
        # Exact where the folded scale is a power of two, else to the last bit.
        torch.testing.assert_close(again[key], tensor, rtol=2e-7, atol=0)


def test_loading_a_scale_of_a_power_of_two_is_exact(model: StandIn) -> None:
    adapter = attach(model, algo="loha", network_dim=4)
    perturb(adapter)
    state = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
    before = [p.clone() for group in adapter.groups() for p in group.parameters]
    adapter.load_state_dict(state)
    after = [p for group in adapter.groups() for p in group.parameters]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_half_precision_files_load(model: StandIn) -> None:
    adapter = attach(model, algo="lora", rs_lora=True, network_dim=3)
    perturb(adapter)
    adapter.load_state_dict({k: t.bfloat16() for k, t in adapter.state_dict().items()})
    assert all(p.dtype == torch.float32 for group in adapter.groups() for p in group.parameters)


def test_files_of_another_network_are_refused(model: StandIn) -> None:
    adapter = attach(model, algo="lora")
    state = adapter.state_dict()
    name = next(iter(state)).partition(".")[0]
    missing = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.")}
    reshaped = state | {f"{name}.lora_up.weight": torch.zeros(3, 3)}
    rescaled = state | {f"{name}.alpha": torch.tensor(4.0)}
    for wrong, complaint in (
        (missing, "3 keys are missing"),
        (state | {"lora_unet_nothing.alpha": torch.tensor(1.0)}, "1 keys are unknown"),
        (reshaped, r"with \[3, 3\], expected"),
        (rescaled, "is 4, expected 1"),
    ):
        with pytest.raises(UserError, match=complaint):
            adapter.load_state_dict(wrong)


def test_detached_model_is_the_bare_one(model: StandIn) -> None:
    before = model.outputs()
    adapter = attach(model, algo="lokr", use_scalar=True)
    perturb(adapter)
    changed = model.outputs()
    adapter.detach()
    assert not any(torch.equal(old, new) for old, new in zip(before, changed, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, model.outputs(), strict=True))
    assert not any("forward" in vars(layer) for layer in layers_of(model).values())


@pytest.mark.parametrize("algo", ["lora", "loha", "lokr"])
def test_same_seed_gives_the_same_network(model: StandIn, algo: str) -> None:
    some = replace(model, parts=model.parts[1:2])
    first, second, other = (attach(some, seed=seed, algo=algo).state_dict() for seed in (2, 2, 3))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("options", SOME, ids=ids)
def test_gradients_reach_every_part(model: StandIn, options: Any) -> None:
    adapter = attach(model, **options)
    perturb(adapter)
    unet, te1, te2 = model.parts
    loss: Any = torch.stack([output.square().mean() for output in model.run()]).sum()
    loss.backward()
    groups = adapter.groups()
    assert [(group.part, group.name, group.lr) for group in groups] == [
        (part.name, part.group, part.lr) for part in (unet, te1, te2)
    ]
    for group in groups:
        assert len({id(parameter) for parameter in group.parameters}) == len(group.parameters)
        reached = [p.grad is not None and p.grad.isfinite().all() for p in group.parameters]
        # The last hidden state of CLIP is all that te1 gives: nothing in it is unused.
        assert all(reached)
    assert all(p.grad is None for part in model.parts for p in part.module.parameters())


def test_only_parts_that_train_are_adapted(model: StandIn) -> None:
    some = replace(model, parts=model.parts[1:2])
    adapter = attach(some, algo="lora")
    assert [group.part for group in adapter.groups()] == ["te1"]
    assert all(key.startswith("lora_te1_text_model_encoder_") for key in adapter.state_dict())


def test_presets_of_two_networks_do_not_meet(model: StandIn) -> None:
    from lycoris.kohya import LycorisNetworkKohya

    before = {name: value for name, value in vars(LycorisNetworkKohya).items() if name.isupper()}
    wanted = {}
    for preset in ("unet-convblock-only", "attn-only", "full"):
        adapter = attach(model, algo="lora", preset=preset)
        wanted[preset] = adapter.state_dict().keys()
        adapter.detach()
    both = [attach(model, algo="lora", preset=preset) for preset in ("full", "attn-only")]
    assert both[0].state_dict().keys() == wanted["full"]
    assert both[1].state_dict().keys() == wanted["attn-only"]
    for adapter in reversed(both):
        adapter.detach()
    assert attach(model, algo="lora").state_dict().keys() == wanted["full"]
    assert {n: v for n, v in vars(LycorisNetworkKohya).items() if n.isupper()} == before


@pytest.mark.parametrize(
    ("preset", "inside", "outside"),
    [
        ("full", "input_blocks_1_0_in_layers_2", "input_blocks_0_0"),
        ("full-lin", "input_blocks_1_0_emb_layers_1", "input_blocks_1_0_in_layers_2"),
        ("attn-mlp", "middle_block_1_proj_in", "input_blocks_1_0_emb_layers_1"),
        ("attn-only", "middle_block_1_transformer_blocks_0_attn1_to_k", "middle_block_1_proj_in"),
        ("unet-only", "output_blocks_2_2_conv", "output_blocks_9_0_in_layers_2"),
        ("unet-convblock-only", "input_blocks_3_0_op", "middle_block_1_proj_in"),
    ],
)
def test_presets_choose_their_blocks(
    model: StandIn, preset: str, inside: str, outside: str
) -> None:
    keys = attach(model, preset=preset).state_dict().keys()
    assert f"lora_unet_{inside}.alpha" in keys
    assert f"lora_unet_{outside}.alpha" not in keys
    has_text = any(key.startswith("lora_te") for key in keys)
    assert has_text == (not preset.startswith("unet-"))
