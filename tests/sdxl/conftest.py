"""Tiny SDXL models, written once for all tests here, and a stand-in for the run's configuration."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.modeling_utils import no_init_weights
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_lora_plugins.model import SDXL, TINY, Sdxl
from sdxl_lora_plugins.networks import Lora
from sdxl_lora_plugins.optimizers import AdamW
from sdxl_lora_plugins.quantizations import Unquantized
from sdxl_train import NoiseSchedule
from sdxl_train.assembly import Assembly, assemble
from sdxl_train.data.dataset_options import DatasetOptions
from sdxl_train.ldm.loaded import LoadedLdm, Modules, Origins
from sdxl_train.ldm.text import TextOptions
from sdxl_train.ldm.tiny import write_tiny

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdxl_train import Network, RunConfig

DATA = Path(__file__).parent.parent / "data"
SEED = 7


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Keep torch from spreading tiny work over busy cores: it would wait more than work."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Any]:
    """Read a golden file by its name without ``.json.gz``."""

    def read(name: str) -> Any:
        return json.loads(gzip.decompress((DATA / f"{name}.json.gz").read_bytes()))

    return read


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL as a diffusers folder. Not to be written to."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "folder", SDXL, TINY, seed=SEED)


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tiny SDXL as a single file. Not to be written to."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    return write_tiny(path, SDXL, TINY, seed=SEED, single_file=True)


@pytest.fixture(scope="session")
def load_sdxl() -> Callable[..., LoadedLdm]:
    """Build the component from a path and options."""

    def load(path: Path | str, device: str = "cpu", **options: Any) -> LoadedLdm:
        dtype = options.pop("dtype", torch.float32)
        return Sdxl(pretrained_model_name_or_path=str(path), **options).build(device, dtype)

    return load


@pytest.fixture
def run_config() -> Callable[..., RunConfig]:
    """Make what ``Sdxl.check`` reads of a configuration."""

    def make(model: Sdxl, *, learning_rate: float = 1e-4, cache: bool = False) -> RunConfig:
        stand_in = SimpleNamespace(
            model=model,
            optimizer=SimpleNamespace(learning_rate=learning_rate),
            network=Lora(),
            is_set=lambda name: False,
            dataset=DatasetOptions(cache_text_encoder_outputs=cache),
            place=lambda name: f"--{name}",
        )
        return cast("RunConfig", stand_in)

    return make


@pytest.fixture
def sizes() -> Callable[[int], dict[str, torch.Tensor]]:
    """Make the size conditioning of a batch of 64 x 96 images."""

    def make(batch: int) -> dict[str, torch.Tensor]:
        return {
            "original_size": torch.tensor([[100, 151]] * batch),
            "crop_top_left": torch.tensor([[0, 6]] * batch),
            "target_size": torch.tensor([[64, 96]] * batch),
        }

    return make


# The published configuration of stabilityai/stable-diffusion-xl-base-1.0.
UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TE1 = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
TE2 = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}


@pytest.fixture(scope="session")
def full_size_modules() -> Modules:
    """The networks of the full-size SDXL on the meta device; the VAE is only a stand-in."""
    with torch.device("meta"):
        return Modules(
            unet=UNet2DConditionModel(**UNET),
            text_encoders=(
                CLIPTextModel(CLIPTextConfig(**TE1, num_attention_heads=12)),
                CLIPTextModelWithProjection(
                    CLIPTextConfig(**TE2, num_attention_heads=20, projection_dim=1280)
                ),
            ),
            vae=AutoencoderKL(block_out_channels=(32, 32, 32, 32), latent_channels=4),
            tokenizers=cast("Any", ()),
        )


@pytest.fixture(scope="session")
def attach_full_size(full_size_modules: Modules) -> Callable[..., Assembly]:
    """Assemble the full-size model and a network, and give the model back."""

    def assembled(network: Network, learning_rate: float = 1e-3, **options: Any) -> Assembly:
        component = Sdxl(pretrained_model_name_or_path="sdxl", **options)
        model = LoadedLdm(
            SDXL,
            full_size_modules,
            rates=component.rates(),
            schedule=NoiseSchedule.scaled_linear(),
            reading=TextOptions(clip_skip=2, final_norm=False),
            latent_scaling=0.13025,
            origins=Origins(model=None, model_name="sdxl"),
            device=torch.device("meta"),
        )
        config: Any = SimpleNamespace(
            model=SimpleNamespace(build=lambda device, dtype: model),
            quantization=Unquantized(),
            network=network,
            optimizer=AdamW(learning_rate=learning_rate),
            training=SimpleNamespace(mixed_precision="no"),
            place=lambda name: f"--{name}",
            name_of=lambda kind: "lora",
        )
        with no_init_weights():  # which take long for nothing on this device
            assembly = assemble(config, "meta", 0)
        assembly.adapter.detach()
        return assembly

    return assembled
