"""A model, ready to predict: what the training loop and the networks see of the base model."""

from __future__ import annotations

import gc
import json
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sdxl_train.ldm import text
from sdxl_train.ldm.hashes import full_hash, short_hash, text_hash
from sdxl_train.ldm.parts import TEXT_GROUP, parts_of
from sdxl_train.ldm.unread import UnreadParts, remembered
from sdxl_train.quantized import quantize_layers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch import Tensor
    from transformers import CLIPTokenizer

    from sdxl_train.ldm.family import Family
    from sdxl_train.ldm.sampling import LdmSampler
    from sdxl_train.ldm.unread import Reader
    from sdxl_train.protocols import Part, WeightFormat
    from sdxl_train.schedule import NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class Modules:
    """The networks of a model, and the tokenizers of its text encoders.

    Attributes:
        readers: How the networks get their weights once something needs them; those that are not
            among them have theirs.
    """

    unet: UNet2DConditionModel
    text_encoders: tuple[nn.Module, ...]
    vae: AutoencoderKL
    tokenizers: tuple[CLIPTokenizer, ...]
    readers: dict[nn.Module, Reader] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Origins:
    """Where the weights came from, for the record.

    Attributes:
        model: The base model's file, if it is one.
        model_name: Its file name, folder name or hub id.
        vae: The file of a replacement VAE, if it is one.
        vae_name: Its name likewise; None if the base model's own VAE is used.
    """

    model: Path | None
    model_name: str
    vae: Path | None = None
    vae_name: str | None = None


@dataclass(frozen=True, kw_only=True)
class Computing:
    """How a model computes.

    Attributes:
        offloads: Keeps on the CPU what a prediction keeps for the backward pass.
        keeps_memory: Leaves freed device memory to this process.
        channels_last: The channels of a pixel are side by side in memory.
        reuses_memory: Each prediction may write over what the one before computed.
    """

    offloads: bool = False
    keeps_memory: bool = False
    channels_last: bool = False
    reuses_memory: bool = False


class LoadedLdm:
    """A base model in memory; implements ``sdxl_train.LoadedModel``.

    Each network is read when it is first asked for: so a run whose encodings are cached never has
    text encoders and VAE in memory, and what is to be packed is packed as it is read.

    Args:
        family: What it is.
        modules: The networks, frozen.
        rates: Learning rate by part (``unet``, ``te1``) for those that are adapted; None stands
            for the optimizer's.
        schedule: How the U-Net was trained: its noise, and what it predicts.
        reading: How captions are read.
        latent_scaling: Factor from the VAE's latents to the U-Net's.
        origins: Where the weights came from.
        device: Where the networks are.
        computing: How it computes.
    """

    def __init__(
        self,
        family: Family,
        modules: Modules,
        *,
        rates: Mapping[str, float | None],
        schedule: NoiseSchedule,
        reading: text.TextOptions,
        latent_scaling: float,
        origins: Origins,
        device: torch.device,
        computing: Computing = Computing(),
    ) -> None:
        self.family = family
        self._unet: nn.Module = modules.unet
        self._text_encoders = modules.text_encoders
        # A plan knows no weights, but the numbers of the schedule.
        self.schedule = schedule if device.type == "meta" else schedule.to(device)
        self.latent_scale = 2 ** (len(modules.vae.config["block_out_channels"]) - 1)
        self.latent_scaling = latent_scaling
        self.tokenizers = modules.tokenizers
        self._vae: AutoencoderKL | None = modules.vae
        self._unread = UnreadParts(modules.readers)
        self.max_tokens = reading.max_tokens
        self._reading = reading
        self._device = device
        # Weights may be stored in less; what they are computed in is that of the first layer.
        self._dtype: torch.dtype = modules.unet.conv_in.weight.dtype
        self._computing = computing
        self._format = torch.channels_last if computing.channels_last else torch.preserve_format
        self._origins = origins
        self._merged: list[dict[str, Any]] = []
        parts = parts_of(family, modules.unet, modules.text_encoders, rates)
        self._parts = tuple(part for part in parts if part.name in rates)
        self.frozen_parts = tuple(part for part in parts if part.name not in rates)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that are adapted, with their weights."""
        for part in self._parts:
            self._unread.read(part.module)
        return self._parts

    @property
    def denoiser(self) -> nn.Module:
        """The U-Net, with its weights."""
        self._unread.read(self._unet)
        return self._unet

    @property
    def text_encoders(self) -> tuple[nn.Module, ...]:
        """The text encoders, with their weights; none once they are released."""
        self.read_encoders(images=False, text=True)
        return self._text_encoders

    @property
    def vae(self) -> AutoencoderKL | None:
        """The VAE, with its weights; None once it is released."""
        self.read_encoders(images=True, text=False)
        return self._vae

    @property
    def image_encoder(self) -> nn.Module | None:
        """The VAE, with its weights or without."""
        return self._vae

    def read_encoders(self, *, images: bool, text: bool) -> None:
        """Read what will encode images, text or both; see :class:`UnreadEncoders`.

        Raises:
            UserError: If a file was changed since the start, lacks tensors or holds NaN.
        """
        if images and self._vae is not None:
            self._unread.read(self._vae)
        for encoder in self._text_encoders if text else ():
            self._unread.read(encoder)

    def quantize(self, form: WeightFormat, *, denoiser_only: bool) -> None:
        """Store frozen weights in a format, all but the U-Net's first and last layers.

        What is not read yet will be packed as it is read.
        """
        quantize_layers(self._unet, ("down_blocks", "mid_block", "up_blocks"), form)
        for encoder in () if denoiser_only else self._text_encoders:
            quantize_layers(encoder, ("",), form)

    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] in [-1, 1]: the mode of the posterior, scaled, in fp32."""
        assert self.vae is not None, "the image encoder was released"
        posterior = self.vae.encode(images.to(self.vae.device, self.vae.dtype)).latent_dist
        latents: Tensor = posterior.mode().float()
        return latents * self.latent_scaling

    def read_latents(self, image: Path, size: tuple[int, int]) -> dict[bool, Tensor]:
        """Read the latents that sd-scripts keeps beside an image; see :class:`LatentReader`.

        Raises:
            ValueError: If there is a file, and it cannot be used.
        """
        from sdxl_train.ldm.npz import find_npz, read_npz

        path = find_npz(image, size, self.family.npz)
        found = {} if path is None else read_npz(path, size)
        return {flipped: latents * self.latent_scaling for flipped, latents in found.items()}

    def encode_text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Encode captions.

        Gradients flow if the caller lets them; nothing here turns them off.

        Returns:
            ``context`` [B, 75 n + 2, width of all encoders], and of a family whose U-Net is told
            one ``pooled`` [B, pooled width].
        """
        return self._encode(captions, weighted=self._reading.weighted)

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts, whose weights (``(word:1.2)``) always count, as in sd-scripts."""
        return self._encode(prompts, weighted=True)

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Count the tokens of captions, also those that are cut off."""
        return text.count_tokens(self.tokenizers[0], captions, weighted=self._reading.weighted)

    def _encode(self, captions: Sequence[str], *, weighted: bool) -> dict[str, Tensor]:
        assert self._text_encoders, "the text encoders were released"
        states: list[Tensor] = []
        encoded: dict[str, Tensor] = {}
        num_chunks = self._reading.num_chunks
        for form, encoder, tokenizer in zip(
            self.family.text_encoders, self.text_encoders, self.tokenizers, strict=True
        ):
            if weighted:
                pairs = [text.weighted_token_ids(tokenizer, caption) for caption in captions]
                tokens = [ids for ids, _ in pairs]
            else:
                tokens = text.token_ids(tokenizer, captions)
            padding = text.PADDING[form.padding]
            ids = text.in_chunks(tokenizer, tokens, num_chunks=num_chunks, padding=padding)
            hidden, pooled = text.encode(
                encoder,
                ids.to(next(encoder.parameters()).device),
                layer=self._reading.clip_skip,
                final_norm=self._reading.final_norm,
            )
            if weighted:
                weights = text.weights_of([w for _, w in pairs], num_chunks=num_chunks)
                hidden = hidden * weights.to(hidden)
            states.append(hidden)
            if pooled is not None:
                encoded["pooled"] = pooled
        return {"context": torch.cat(states, dim=-1), **encoded}

    def image_encoder_identity(self) -> dict[str, str]:
        """Hash the VAE as it is in memory, and its scaling."""
        assert self._vae is not None, "the image encoder was released"
        return {
            "the VAE": self._unread.hash([self._vae], [str(self.latent_scaling)]),
            "the VAE's precision": str(self._vae.dtype),
        }

    def text_encoders_identity(self) -> dict[str, str]:
        """Hash the text encoders as they are in memory, and how captions become tokens."""
        assert self._text_encoders, "the text encoders were released"
        tokenizers = [text.identity(tokenizer) for tokenizer in self.tokenizers]
        return {
            "the text encoders": self._unread.hash(self._text_encoders, []),
            "the tokenizers": text_hash(tokenizers),
            "max_token_length": str(self.max_tokens),
            "clip_skip": str(self._reading.clip_skip),
            "weighted_captions": str(self._reading.weighted),
        }

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Predict noise or velocity, fp32 like the latents' shape [B, 4, h, w]."""
        if self._computing.reuses_memory:
            # Or inference would take each compiled block for a prediction of its own.
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        with self._kept_for_backward():
            prediction: Tensor = self.denoiser(
                noisy.to(self._dtype, memory_format=self._format),
                timesteps,
                encoder_hidden_states=condition["context"].to(self._dtype),
                added_cond_kwargs=self._added(noisy, condition),
                return_dict=False,
            )[0]
        return prediction.float()

    def _added(self, noisy: Tensor, condition: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Give what the U-Net is told beside the text: pooled text, sizes and crop, if it is."""
        if not self.family.pooled:
            return None
        # Pixel sizes stay integers until the embedding: bf16 knows no 1023.
        sizes = [condition[key] for key in ("original_size", "crop_top_left", "target_size")]
        return {
            "text_embeds": condition["pooled"].to(self._dtype),
            "time_ids": torch.cat(sizes, dim=1).to(noisy.device),
        }

    def _kept_for_backward(self) -> AbstractContextManager[Any]:
        if not self._computing.offloads:
            return nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=self._device.type == "cuda")

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Give what :meth:`predict` should return."""
        return self.schedule.target(latents, noise, timesteps)

    def read_network(self, path: Path) -> dict[str, Tensor]:
        """Read a network's file, in any naming, under kohya's names.

        Raises:
            UserError: If it is no network for this family, or broken.
        """
        from sdxl_train.ldm.files.tensors import read_tensors

        return read_tensors(path, self.family)

    def describe_network(self, tensors: Mapping[str, Tensor]) -> str:
        """Name the algorithms in a network: ``LoRA and LoCon``."""
        from sdxl_train.ldm.files.network_file import NetworkFile

        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        file = NetworkFile.of_shapes(shapes, self.family)
        return " and ".join(sorted({module.title for module in file.modules.values()}))

    def merge_networks(self, networks: Sequence[tuple[Path, float]]) -> None:
        """Add networks' deltas to the weights; on the meta device only check whether they fit.

        Raises:
            UserError: If one is no network for this family, is broken, or does not fit.
        """
        from sdxl_train.ldm.files.merging import merge_into

        parts = (*self._parts, *self.frozen_parts)
        merge_into(parts, networks, self.family, self._unread.read_to_change)
        if self._device.type != "meta":
            self._merged = [
                {"name": path.name, "sha256": full_hash(path), "multiplier": multiplier}
                for path, multiplier in networks
            ]

    def diffusers_network(
        self, tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Name a network's tensors as diffusers does, and give peft's configuration of it.

        Raises:
            UserError: If it has other deltas than those of plain LoRA.
        """
        from sdxl_train.ldm.files.for_diffusers import for_diffusers

        return for_diffusers(tensors, self.family)

    def sampler(self) -> LdmSampler:
        """Give what generates pictures with this model as it is at the time."""
        from sdxl_train.ldm.sampling import LdmSampler

        assert self.vae is not None, "the image encoder was released"
        return LdmSampler(self, self.vae)

    def release_image_encoder(self) -> None:
        """Free the VAE; a sampler that was made before keeps it in main memory."""
        released, self._vae = self._vae, None
        if released is not None and self._unread.forget([released]):
            released.to("cpu")
            del released
            self._free_memory()

    def release_text_encoders(self) -> None:
        """Free the text encoders, which must not be adapted."""
        assert all(part.group != TEXT_GROUP for part in self._parts), (
            "text encoders are in training"
        )
        released, self._text_encoders = self._text_encoders, ()
        self.frozen_parts = tuple(p for p in self.frozen_parts if p.group != TEXT_GROUP)
        if self._unread.forget(released):
            del released
            self._free_memory()

    def _free_memory(self) -> None:
        gc.collect()
        if not self._computing.keeps_memory and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def metadata(self) -> dict[str, str]:
        """Describe the base model under the names of sd-scripts and of the ModelSpec standard."""
        is_v = self.schedule.prediction_type == "v_prediction"
        return {
            **self.family.metadata(is_v),
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.prediction_type": "v" if is_v else "epsilon",
            "ss_zero_terminal_snr": str(self.schedule.zero_terminal_snr),
            **self._origin_metadata,
            **({"ss_base_weights": json.dumps(self._merged)} if self._merged else {}),
        }

    @cached_property
    def _origin_metadata(self) -> dict[str, str]:
        """Names and hashes of files; reads each file once, when first asked for."""
        origins = self._origins
        entries = {"ss_sd_model_name": origins.model_name}
        if origins.model is not None:
            entries["ss_sd_model_hash"] = short_hash(origins.model)
            entries["ss_new_sd_model_hash"] = _file_hash(origins.model)
        if origins.vae_name is not None:
            entries["ss_vae_name"] = origins.vae_name
        if origins.vae is not None:
            entries["ss_vae_hash"] = short_hash(origins.vae)
            entries["ss_new_vae_hash"] = _file_hash(origins.vae)
        return entries


def _file_hash(path: Path) -> str:
    return remembered([path], ["sha256"], partial(full_hash, path))
