"""A LoRA trained on photographs lowers the loss, changes images, and means the same everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from sdxl_lora_plugins.model import Sdxl
from sdxl_lora_plugins.networks import Lora

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from tests.end_to_end.conftest import Trained, TrainLora

RANK, ALPHA = 16, 8.0


@pytest.fixture(scope="module")
def learned(train_lora: TrainLora, deep_folder: Path) -> Trained:
    """A LoRA that had time to learn."""
    return train_lora(
        pretrained_model_name_or_path=str(deep_folder),
        network_dim=RANK,
        network_alpha=ALPHA,
        learning_rate=1e-2,
        max_train_steps=48,
        train_batch_size=4,
        cache_latents=True,
    )


@pytest.fixture
def pipeline(deep_folder: Path) -> Any:
    """The untouched model in diffusers."""
    loaded = StableDiffusionXLPipeline.from_pretrained(deep_folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    """What a U-Net and two text encoders are asked, of the tiny model's widths."""
    generator = torch.Generator().manual_seed(3)
    return {
        "noisy": torch.randn(2, 4, 8, 12, generator=generator),
        "timesteps": torch.tensor([20, 900]),
        "time_ids": torch.tensor([[100, 150, 2, 11, 64, 96]] * 2),
    }


CAPTIONS = ["a tabby cat, close up", "a rocket"]


def forward(pipeline: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the outputs of text encoders and U-Net in diffusers."""
    with torch.no_grad():
        context, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
        prediction = pipeline.unet(
            inputs["noisy"],
            inputs["timesteps"],
            encoder_hidden_states=context,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": inputs["time_ids"]},
        ).sample
    return {"context": context, "pooled": pooled, "prediction": prediction}


def live_forward(model: Path, weights: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the same outputs by the network that trains, with the weights of a file."""
    sdxl = Sdxl(pretrained_model_name_or_path=str(model)).build("cpu", torch.float32)
    adapter = Lora(network_dim=RANK, network_alpha=ALPHA).build(sdxl)
    adapter.load_state_dict(load_file(weights))
    sizes = dict(
        zip(
            ("original_size", "crop_top_left", "target_size"),
            torch.split(inputs["time_ids"], 2, dim=1),
            strict=True,
        )
    )
    with torch.no_grad():
        text = sdxl.encode_text(CAPTIONS)
        prediction = sdxl.predict(inputs["noisy"], inputs["timesteps"], {**text, **sizes})
    return {**text, "prediction": prediction}


def merge(pipeline: Any, weights: Path) -> int:
    """Add ``alpha / r * up @ down`` to each weight that a file names; give their number.

    Names follow the rule of the format: the prefix tells the part, dots became underscores, and the
    blocks of the U-Net are counted as SGM does.
    """
    state = load_file(weights)
    paths = module_names(pipeline)
    modules = {name.removesuffix(".alpha") for name in state if name.endswith(".alpha")}
    for name in modules:
        down, up = state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"]
        delta = state[f"{name}.alpha"] / down.shape[0] * up @ down
        paths[name].weight.data += delta
    return len(modules)


def module_names(pipeline: Any) -> dict[str, torch.nn.Linear]:
    """Give every linear layer under its name in files."""
    named: dict[str, torch.nn.Linear] = {}
    for prefix, encoder in (
        ("lora_te1", pipeline.text_encoder),
        ("lora_te2", pipeline.text_encoder_2),
    ):
        for path, layer in encoder.named_modules():
            stem = path if path.startswith("text_") else f"text_model.{path}"
            named[f"{prefix}_{stem}".replace(".", "_")] = layer
    for path, layer in pipeline.unet.named_modules():
        kind, _, rest = path.partition(".")
        words = rest.split(".")
        if "attentions" not in words or not isinstance(layer, torch.nn.Linear):
            continue
        inner = ".".join(words[words.index("attentions") + 2 :])
        if kind == "mid_block":
            block = "middle_block"
        elif kind == "down_blocks":
            # conv_in is block 0; each level has two layers and a downsampler.
            block = f"input_blocks.{1 + 3 * int(words[0]) + int(words[2])}"
        else:
            block = f"output_blocks.{3 * int(words[0]) + int(words[2])}"
        named[f"lora_unet_{block}.1.{inner}".replace(".", "_")] = layer
    return named


@torch.no_grad()
def mean_loss(pipeline: Any, photographs: Path) -> float:
    """Give the mean loss over all photographs at fixed noise and timesteps, by diffusers."""
    schedule = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    generator = torch.Generator().manual_seed(5)
    losses = []
    for path in sorted(photographs.glob("*/*.png")):
        picture = np.asarray(Image.open(path).resize((64, 64)))
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        latents = pipeline.vae.encode(pixels).latent_dist.mode() * 0.13025
        latents = latents.expand(16, -1, -1, -1)
        timesteps = torch.linspace(0, 999, 16).long()
        noise = torch.randn(latents.shape, generator=generator)
        caption = path.with_suffix(".txt").read_text(encoding="utf-8")
        context, _, pooled, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False)
        predicted = pipeline.unet(
            schedule.add_noise(latents, noise, timesteps),
            timesteps,
            encoder_hidden_states=context.expand(16, -1, -1),
            added_cond_kwargs={
                "text_embeds": pooled.expand(16, -1),
                "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]] * 16),
            },
        ).sample
        losses.append(torch.nn.functional.mse_loss(predicted, noise).item())
    return sum(losses) / len(losses)


def test_loss_falls_markedly_below_the_untouched_model(
    learned: Trained, pipeline: Any, photographs: Path
) -> None:
    before = mean_loss(pipeline, photographs)
    pipeline.load_lora_weights(learned.path)
    after = mean_loss(pipeline, photographs)
    # The random model's own output adds about 0.5 to the unit variance of the noise.
    assert before > 1.4
    assert after < 0.75 * before


def test_reported_losses_fall_while_training(learned: Trained) -> None:
    losses = [step["loss"] for step in learned.steps]
    assert len(losses) == 48
    assert sum(losses[-10:]) / 10 < 0.75 * losses[0]


def test_images_with_the_lora_differ_from_those_without(learned: Trained, pipeline: Any) -> None:
    def sample() -> np.ndarray[Any, Any]:
        images: np.ndarray[Any, Any] = pipeline(
            "a tabby cat",
            num_inference_steps=3,
            height=64,
            width=64,
            output_type="np",
            generator=torch.Generator().manual_seed(1),
        ).images
        return images

    without = sample()
    pipeline.load_lora_weights(learned.path)
    with_lora = sample()
    assert np.isfinite(with_lora).all()
    assert np.abs(with_lora - without).mean() > 0.01


def test_file_means_the_same_live_in_diffusers_and_by_formula(
    learned: Trained, pipeline: Any, deep_folder: Path, inputs: dict[str, Tensor]
) -> None:
    untouched = forward(pipeline, inputs)
    live = live_forward(deep_folder, learned.path, inputs)

    pipeline.load_lora_weights(learned.path)
    in_diffusers = forward(pipeline, inputs)
    pipeline.unload_lora_weights()
    assert_same(forward(pipeline, inputs), untouched)

    assert merge(pipeline, learned.path) == len(learned.tensors) // 3
    merged = forward(pipeline, inputs)

    for name in untouched:
        assert (live[name] - untouched[name]).abs().max() > 0.01
    assert_same(live, merged)
    assert_same(in_diffusers, merged)


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-4, atol=2e-5, msg=name)


def test_diffusers_uses_every_key_of_the_file(
    learned: Trained, pipeline: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline.load_lora_weights(learned.path)
    modules = [
        module
        for part in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
        for module in part.modules()
        if hasattr(module, "lora_A")
    ]
    assert len(modules) == len(learned.tensors) // 3
    assert not [record for record in caplog.records if "unexpected" in record.message.lower()]
    for module in modules:
        assert module.scaling["default_0"] == pytest.approx(ALPHA / RANK)
