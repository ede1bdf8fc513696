"""Files in real clients: diffusers and LyCORIS load every tensor and compute what training did.

Which client reads which network is what was measured in them: diffusers nothing but plain LoRA and
LoCon; LyCORIS everything but DoRA by input and Tucker cores of LoKr.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from lycoris.kohya import create_network_from_weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdxl_lora_plugins.networks import Locon, Lokr, Lora
from sdxl_train_lycoris.networks import ALGORITHMS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sdxl_train import Network
    from sdxl_train.ldm.loaded import LoadedLdm

SIZE = {"network_dim": 4, "network_alpha": 2.0}
BOTH, LYCORIS = ("diffusers", "lycoris"), ("lycoris",)
DIFFUSERS = ("diffusers", "diffusers' own naming")
DORA = {"dora_wd": True, "wd_on_output": True}
LYCORIS_OPTIONS: dict[str, dict[str, Any]] = {
    "dylora": {"network_dim": 4, "block_size": 2, "conv_dim": 2},
    "diag-oft": {"network_dim": 4, "constraint": 0.01, "rescaled": True},
    "boft": {"network_dim": 8},
}
NETWORKS: dict[str, tuple[Network, tuple[str, ...]]] = {
    "lora": (Lora(**SIZE), (*BOTH, "diffusers' own naming")),
    "lora-conv": (Lora(**SIZE, conv_dim=2, conv_alpha=1), BOTH),
    "lora-rs": (Lora(**SIZE, rs_lora=True), ("diffusers",)),
    "lora-blocks": (
        Lora.model_validate({**SIZE, "block_dims": "input_*=2,middle=6"}),
        DIFFUSERS,
    ),
    "lora-encoders": (
        Lora.model_validate({**SIZE, "rules": "te1.*fc1 dim=2; te2.*q_proj dim=6"}),
        ("diffusers' own naming",),
    ),
    "locon": (Locon(**SIZE, conv_dim=2), BOTH),
    "lokr": (Lokr(**SIZE), LYCORIS),
    "lokr-conv": (Lokr(**SIZE, conv_dim=2, decompose_both=True, factor=4), LYCORIS),
    "lokr-full": (Lokr(full_matrix=True), LYCORIS),
    **{
        f"lycoris-{name}": (
            network.model_validate(LYCORIS_OPTIONS.get(name, {**SIZE, "conv_dim": 2})),
            BOTH if name in ("lora", "locon", "dylora") else LYCORIS,
        )
        for name, network in ALGORITHMS.items()
        # LyCORIS fails to read its own files of ia3. It takes full differences twice when a state
        # is loaded over a network that was made of the file, as it is here.
        if name not in ("ia3", "full")
    },
    "lycoris-lora-dora": (ALGORITHMS["lora"].model_validate({**SIZE, **DORA}), LYCORIS),
    "lycoris-loha-dora": (ALGORITHMS["loha"].model_validate({**SIZE, **DORA}), LYCORIS),
    "lycoris-loha-tucker": (
        ALGORITHMS["loha"].model_validate({**SIZE, "conv_dim": 2, "use_tucker": True}),
        LYCORIS,
    ),
    "lycoris-lora-tucker": (
        ALGORITHMS["lora"].model_validate({**SIZE, "conv_dim": 2, "use_tucker": True}),
        LYCORIS,
    ),
}
CASES = [(name, client) for name, (_, clients) in NETWORKS.items() for client in clients]


@dataclass
class Saved:
    """A network's file, and what the model with the live network gave."""

    path: Path
    keys: set[str]
    outputs: list[Tensor]


@pytest.fixture(scope="module")
def model(load_sdxl: Callable[..., LoadedLdm], tiny_folder: Path) -> LoadedLdm:
    return load_sdxl(tiny_folder)


@pytest.fixture(scope="module")
def saved(model: LoadedLdm, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """Give every factor of a network random values, and save it, once for all clients."""
    made: dict[str, Saved] = {}
    folder = tmp_path_factory.mktemp("files")

    def make(name: str) -> Saved:
        if name not in made:
            adapter = NETWORKS[name][0].build(model)
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for group in adapter.groups():
                    for tensor in group.parameters:
                        noise = torch.randn(tensor.shape, generator=generator)
                        tensor.add_(0.05 * noise)
            tensors = {key: t.contiguous() for key, t in adapter.state_dict().items()}
            path = folder / f"{name}.safetensors"
            save_file(tensors, path)
            outputs = run(model.denoiser, *model.text_encoders)
            adapter.detach()
            made[name] = Saved(path, set(tensors), outputs)
        return made[name]

    return make


@torch.no_grad()
def run(unet: nn.Module, *encoders: nn.Module) -> list[Tensor]:
    """Give the output of the U-Net and of both text encoders for fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    config: Any = unet.config
    widths = config.cross_attention_dim, config.projection_class_embeddings_input_dim
    pooled = widths[1] - 6 * config.addition_time_embed_dim
    added = {
        "text_embeds": torch.randn(1, pooled, generator=generator),
        "time_ids": torch.full((1, 6), 64.0),
    }
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    context = torch.randn(1, 77, widths[0], generator=generator)
    outputs = [unet(latents, torch.tensor([7]), context, added_cond_kwargs=added).sample]
    tokens = torch.tensor([[49406, 320, 1125, 539, 49407]])
    return [*outputs, *(encoder(tokens).last_hidden_state for encoder in encoders)]


def in_diffusers(saved: Saved, path: Path, unet: Any, te1: Any, te2: Any) -> set[str]:
    """Load a file as users of diffusers do; give the keys that it took."""
    pipe = StableDiffusionXLPipeline(
        vae=None,
        text_encoder=te1,
        text_encoder_2=te2,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=None,
        add_watermarker=False,
    )
    pipe.load_lora_weights(path, adapter_name="x")
    layers = sum("x" in getattr(m, "lora_A", {}) for p in (unet, te1, te2) for m in p.modules())
    assert layers == len({key.partition(".")[0] for key in saved.keys})
    return saved.keys


def named_for_diffusers(saved: Saved, model: LoadedLdm) -> Path:
    """Write the folder of ``save_model_as=diffusers``."""
    folder = saved.path.with_suffix("")
    folder.mkdir()
    tensors, metadata = model.diffusers_network(load_file(saved.path))
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", metadata)
    return folder


def in_lycoris(saved: Saved, unet: Any, te1: Any, te2: Any, names: dict[str, str]) -> set[str]:
    """Load a file as sd-scripts with LyCORIS does; give the keys that it took."""
    encoders = [text_view(te1), text_view(te2)]
    view = unet_view(unet, names)
    network, tensors = create_network_from_weights(1.0, str(saved.path), None, encoders, view)
    network.apply_to(encoders, view, True, True)
    info = network.load_state_dict(tensors, strict=False)
    # Learned scalars are folded into the factors, which is what their absence means.
    assert not [key for key in info.missing_keys if not key.endswith(".scalar")]
    network.eval()
    # The client replaces forwards and keeps nothing that keeps it alive.
    unet.client = [network]
    return saved.keys - set(info.unexpected_keys)


def text_view(encoder: nn.Module) -> nn.Module:
    """Give an encoder the level that newer transformers lack and files have."""
    if any(name.startswith("text_model") for name, _ in encoder.named_modules()):
        return encoder
    view = nn.Module()
    view.add_module("text_model", encoder)
    return view


def unet_view(unet: nn.Module, names: dict[str, str]) -> nn.Module:
    """Give the U-Net's layers the names that they have in files, which kohya's U-Net has."""
    view = nn.Module()
    for path, name in names.items():
        found = re.fullmatch(r"((?:in|out)put_blocks_\d+_\d|middle_block_\d)_(.*)", name)
        block, leaf = found.groups() if found else ("", name)
        if block and not hasattr(view, block):
            view.add_module(block, nn.Module())
        (view.get_submodule(block) if block else view).add_module(leaf, unet.get_submodule(path))
    return view


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "client"), CASES)
def test_client_takes_every_tensor_and_computes_as_training_did(
    name: str, client: str, saved: Callable[[str], Saved], model: LoadedLdm
) -> None:
    file = saved(name)
    before = run(model.denoiser, *model.text_encoders)
    unet, te1, te2 = copy.deepcopy((model.denoiser, *model.text_encoders))

    if client == "diffusers":
        taken = in_diffusers(file, file.path, unet, te1, te2)
    elif client == "diffusers' own naming":
        taken = in_diffusers(file, named_for_diffusers(file, model), unet, te1, te2)
    else:
        (part,) = [part for part in model.parts if part.name == "unet"]
        taken = in_lycoris(file, unet, te1, te2, dict(part.file_names))

    assert taken == file.keys
    for ours, theirs, bare in zip(file.outputs, run(unet, te1, te2), before, strict=True):
        effect = (ours - bare).norm()
        assert effect > 1e-3
        assert (theirs - ours).norm() < 1e-3 * effect
