"""An independent implementation gives the same losses and weights.

diffusers' U-Net, VAE and noise schedule, transformers' text encoders, peft's LoRA and a plain torch
loop, written from their documentation. From our side come the fresh network (by its file), the
order of batches and the documented random streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image

from sdxl_train.preflight import prepare
from sdxl_train.rng import Streams
from sdxl_train.settings import from_mapping

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from sdxl_train.data.batches import BatchSpec
    from tests.end_to_end.conftest import Trained, TrainLora

UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj"]
UNET_LAYERS += ["ff.net.2"]
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
PREFIXES = {"unet": "unet.", "te1": "text_encoder.", "te2": "text_encoder_2."}

STEPS, WARMUP, ACCUMULATION = 8, 2, 2
RANK, ALPHA = 4, 2.0
UNET_LR, TEXT_LR = 1e-3, 5e-4
# Adam makes a full step even of a gradient that is only rounding; this eps keeps it from that.
EPS = 1e-6

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "noise offset and min-snr": {"noise_offset": 0.1, "min_snr_gamma": 5.0},
    "velocity with min-snr": {"min_snr_gamma": 5.0},
}


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What the independent implementation gives."""

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, dict[str, Tensor]]


class ReferenceTrainer:
    """SDXL with LoRA by diffusers and peft, trained by a plain loop."""

    def __init__(self, model: Path, initial: Path, options: dict[str, Any]) -> None:
        self.options = options
        self.pipeline = StableDiffusionXLPipeline.from_pretrained(model)
        self.schedule = DDPMScheduler.from_config(
            {**self.pipeline.scheduler.config, "_class_name": "DDPMScheduler"}
        )
        self.parts: dict[str, Any] = {
            "unet": self.pipeline.unet,
            "te1": self.pipeline.text_encoder,
            "te2": self.pipeline.text_encoder_2,
        }
        state = peft_state(initial, self.pipeline)
        for name, part in self.parts.items():
            part.requires_grad_(False)
            layers = UNET_LAYERS if name == "unet" else TEXT_LAYERS
            part.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=layers))
            stem = "text_model." if hasattr(part, "text_model") else ""
            outcome = set_peft_model_state_dict(
                part, {f"{stem}{key}": tensor for key, tensor in state[name].items()}
            )
            assert not outcome.unexpected_keys
            assert not [key for key in outcome.missing_keys if "lora_" in key]

    def train(self, batches: list[list[BatchSpec]], images: list[Any]) -> Reference:
        trained = {name: trainable(part) for name, part in self.parts.items()}
        everything = [parameter for part in trained.values() for parameter in part]
        optimizer = torch.optim.AdamW(
            [
                {"params": trained["unet"], "lr": UNET_LR},
                {"params": [*trained["te1"], *trained["te2"]], "lr": TEXT_LR},
            ],
            weight_decay=0.01,
            eps=EPS,
        )
        scheduler = get_scheduler(
            "cosine", optimizer, num_warmup_steps=WARMUP, num_training_steps=STEPS
        )
        streams = Streams(self.options["seed"])
        losses, norms = [], []
        for step, group in enumerate(batches, start=1):
            total = 0.0
            for position, spec in enumerate(group):
                loss = self.loss([images[s.image] for s in spec.samples], streams, step, position)
                torch.autograd.backward(loss / len(group))
                total += loss.item() / len(group)
            norms.append(float(torch.nn.utils.clip_grad_norm_(everything, 1.0)))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(total)
        weights = {
            name: {k.removeprefix("text_model."): t for k, t in peft_weights(part).items()}
            for name, part in self.parts.items()
        }
        return Reference(losses=losses, grad_norms=norms, weights=weights)

    def loss(self, images: list[Any], streams: Streams, step: int, position: int) -> Tensor:
        latents, sizes = self.encode_images(images)
        timesteps = torch.randint(
            0, 1000, (len(images),), generator=streams.cpu("timesteps", step, position)
        )
        generator = streams.cpu("noise", step, position)
        noise = torch.randn(latents.shape, generator=generator)
        if offset := self.options.get("noise_offset"):
            noise = noise + offset * torch.randn(len(images), 4, 1, 1, generator=generator)
        context, pooled = self.encode_text([caption_of(image) for image in images])
        predicted = self.pipeline.unet(
            self.schedule.add_noise(latents, noise, timesteps),
            timesteps,
            encoder_hidden_states=context,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
        ).sample
        is_velocity = self.schedule.config.prediction_type == "v_prediction"
        target = self.schedule.get_velocity(latents, noise, timesteps) if is_velocity else noise
        each = torch.nn.functional.mse_loss(predicted, target, reduction="none").mean((1, 2, 3))
        if gamma := self.options.get("min_snr_gamma"):
            snr = compute_snr(self.schedule, timesteps)
            each = each * snr.clamp(max=gamma) / (snr + 1 if is_velocity else snr)
        return each.mean()

    @torch.no_grad()
    def encode_images(self, images: list[Any]) -> tuple[Tensor, Tensor]:
        """Cut the middle out of each photograph: none is larger than the resolution."""
        pixels, sizes = [], []
        for image in images:
            picture = np.asarray(Image.open(image.path))
            height, width = picture.shape[:2]
            target_height, target_width = height // 32 * 32, width // 32 * 32
            top, left = (height - target_height) // 2, (width - target_width) // 2
            cut = picture[top : top + target_height, left : left + target_width]
            pixels.append(torch.from_numpy(cut.copy()).permute(2, 0, 1) / 127.5 - 1)
            sizes.append([height, width, top, left, target_height, target_width])
        latents = self.pipeline.vae.encode(torch.stack(pixels)).latent_dist.mean * 0.13025
        return latents, torch.tensor(sizes)

    def encode_text(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        states, pooled = [], None
        encoders = (self.pipeline.text_encoder, self.pipeline.text_encoder_2)
        tokenizers = (self.pipeline.tokenizer, self.pipeline.tokenizer_2)
        for encoder, tokenizer in zip(encoders, tokenizers, strict=True):
            tokens = tokenizer(
                captions,
                padding="max_length",
                max_length=77,
                truncation=True,
                return_tensors="pt",
            )
            output = encoder(tokens.input_ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled = output[0]
        assert pooled is not None
        return torch.cat(states, dim=-1), pooled


def caption_of(image: Any) -> str:
    text: str = image.path.with_suffix(".txt").read_text(encoding="utf-8")
    return text


def peft_weights(part: torch.nn.Module) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = get_peft_model_state_dict(part)
    return weights


def trainable(part: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in part.parameters() if parameter.requires_grad]


def peft_state(path: Path, pipeline: Any) -> dict[str, dict[str, Tensor]]:
    """Read a file of ours as diffusers does, and name its tensors as peft does."""
    state, _ = StableDiffusionXLPipeline.lora_state_dict(path, unet_config=pipeline.unet.config)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, prefix in PREFIXES.items():
        own = {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
        convert = convert_unet_state_dict_to_peft if name == "unet" else convert_state_dict_to_peft
        # CLIP's modules lie in text_model or not, by the version of transformers.
        parts[name] = {k.removeprefix("text_model."): t for k, t in convert(own).items()}
    return parts


def step_batches(options: dict[str, Any]) -> tuple[list[list[BatchSpec]], list[Any]]:
    """Give the batches of every step, and the images that they refer to."""
    prepared = prepare(from_mapping(options))

    def groups() -> Iterator[list[BatchSpec]]:
        for epoch in range(1, STEPS + 1):
            specs = prepared.batches.epoch(epoch)
            for start in range(0, len(specs), ACCUMULATION):
                yield specs[start : start + ACCUMULATION]

    (dataset,) = prepared.scan.datasets
    return [group for group, _ in zip(groups(), range(STEPS), strict=False)], list(dataset.images)


@pytest.fixture(scope="module", params=CASES)
def pair(
    request: pytest.FixtureRequest, train_lora: TrainLora, deep_folder: Path, deep_v_folder: Path
) -> tuple[Trained, Reference, Any]:
    """The same run by this package and by the independent implementation."""
    model = deep_v_folder if "velocity" in request.param else deep_folder
    ours = train_lora(
        pretrained_model_name_or_path=str(model),
        network_dim=RANK,
        network_alpha=ALPHA,
        unet_lr=UNET_LR,
        text_encoder_lr=[TEXT_LR],
        max_train_steps=STEPS,
        lr_scheduler="cosine",
        lr_warmup_steps=WARMUP,
        gradient_accumulation_steps=ACCUMULATION,
        optimizer_args=[f"eps={EPS}"],
        **CASES[request.param],
    )
    reference = ReferenceTrainer(model, ours.folder / "initial.st", ours.options)
    batches, images = step_batches(ours.options)
    assert [[images[s.image].key for b in group for s in b.samples] for group in batches] == [
        step["keys"] for step in ours.steps
    ]
    return ours, reference.train(batches, images), reference.pipeline


def test_losses_and_gradients_equal_those_of_diffusers_and_peft(
    pair: tuple[Trained, Reference, Any],
) -> None:
    ours, reference, pipeline = pair
    assert len(reference.losses) == STEPS
    is_velocity = pipeline.scheduler.config.prediction_type == "v_prediction"
    assert ours.metadata["modelspec.prediction_type"] == ("v" if is_velocity else "epsilon")
    assert [step["loss"] for step in ours.steps] == pytest.approx(reference.losses, abs=1e-5)
    norms = [step["grad_norm"] for step in ours.steps]
    assert norms == pytest.approx(reference.grad_norms, rel=1e-4)


def test_weights_equal_those_of_diffusers_and_peft(pair: tuple[Trained, Reference, Any]) -> None:
    ours, reference, pipeline = pair
    weights = peft_state(ours.path, pipeline)
    initial = peft_state(ours.folder / "initial.st", pipeline)
    for part, expected in reference.weights.items():
        assert weights[part].keys() == expected.keys()
        moved = max((weights[part][n] - initial[part][n]).abs().max() for n in expected)
        assert moved > 1e-3
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[part][name], tensor, rtol=0, atol=1e-5, msg=name)


def test_batches_of_the_parity_runs_are_of_both_buckets(
    pair: tuple[Trained, Reference, Any],
) -> None:
    batches, _ = step_batches(pair[0].options)
    buckets = {spec.bucket for group in batches for spec in group}
    assert buckets == {(64, 64), (64, 32)}
    assert {len(group) for group in batches} == {1, 2}
