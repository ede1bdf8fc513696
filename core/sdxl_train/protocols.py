"""What components build, and the values that they give and get.

Nothing here imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Generator, LongTensor, Size, Tensor, dtype, nn

    from sdxl_train.pictures import ImageSampler
    from sdxl_train.schedule import NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the base model that a network can adapt, such as the U-Net.

    Attributes:
        name: Short and stable, the key in the plan: ``unet``, ``te1``.
        title: What it is, for people: ``text encoder 1 (CLIP ViT-L/14)``.
        group: Name of its optimizer group. Parts that share it and their rate become one group.
        prefix: First word of its modules' names in files: ``lora_unet``.
        module: The part itself.
        lr: Its learning rate; None means the optimizer's ``learning_rate``.
        file_names: From the path of each adaptable layer in ``module``, linear, convolution or
            norm, to its name in files, dots as underscores and without the prefix. Never derive
            names from ``module`` itself: the layout of installed libraries changes, names in files
            do not.
        blocks: The blocks for which users give values one by one, in their order, each with the
            paths of its layers; empty for a part that has none.
    """

    name: str
    title: str
    group: str
    prefix: str
    module: nn.Module
    lr: float | None = None
    file_names: Mapping[str, str]
    blocks: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that train at one rate.

    Attributes:
        part: Name of the :class:`Part` they adapt.
        name: Name of the optimizer group, as logged: ``unet``, ``unet plus``.
        parameters: Leaf tensors that require a gradient.
        lr: Their rate; None means the optimizer's ``learning_rate``.
        lr_factor: Multiplies the rate, whichever it is.
    """

    part: str
    name: str
    parameters: Sequence[nn.Parameter]
    lr: float | None = None
    lr_factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """How long a run is, and its warm-up and its decay at the end, in optimizer steps."""

    total: int
    warmup: int = 0
    decay: int = 0

    def count(self, steps_or_share: float | int) -> int:
        """Give a :data:`StepsOrShare` as a number of steps."""
        if isinstance(steps_or_share, float):
            # 29% of 100 steps is 29, though 0.29 * 100 is a little less in floating point.
            return math.floor(steps_or_share * self.total + 1e-9)
        return steps_or_share


class LoadedModel(Protocol):
    """A base model, ready to predict.

    ``condition`` is what the denoiser is told beside the noisy latents: the tensors that
    ``encode_text`` returned, plus the sizes of the batch as ``original_size``, ``crop_top_left``
    and ``target_size``, each int64 [B, 2] in pixels and (height, width) order.
    """

    schedule: NoiseSchedule
    latent_scale: int
    """Pixels of the image for each latent pixel, along one side."""
    max_tokens: int
    """Tokens of a caption that are read; what is more is cut off."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that this run adapts."""

    @property
    def frozen_parts(self) -> tuple[Part, ...]:
        """The other parts that a network could adapt."""

    @property
    def denoiser(self) -> nn.Module:
        """What predicts; parts whose weights are read when they are needed are read by then."""

    @property
    def text_encoders(self) -> tuple[nn.Module, ...]:
        """What encodes captions, likewise."""

    def encode_images(self, images: Tensor) -> Tensor:
        """Turn images [B, 3, H, W] in [-1, 1] into latents [B, C, H/s, W/s], scaled for training.

        Deterministic: the same image gives the same latents, so a cache changes nothing.
        """

    def encode_text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Encode captions. Each tensor has the batch as its first dimension."""

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts of pictures, in which users may write what captions have no need of."""

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Count the tokens of each caption, also those that are cut off. Needs no weights."""

    def image_encoder_identity(self) -> Mapping[str, str]:
        """Give all that shapes what :meth:`encode_images` gives: weights (a hash), precision.

        The names are for people, who are told which of these changed: ``the VAE``.
        """

    def text_encoders_identity(self) -> Mapping[str, str]:
        """Give all that shapes what :meth:`encode_text` gives: weights, tokens; as above."""

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """Predict the target from noisy latents [B, C, h, w] at int64 timesteps [B]."""

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Give what :meth:`predict` should return: the noise, or the velocity."""

    def read_network(self, path: Path) -> dict[str, Tensor]:
        """Read a network's file under the names that ``Adapter.state_dict`` gives, on the CPU.

        Raises:
            UserError: If it is no network for this model, or broken.
        """

    def describe_network(self, tensors: Mapping[str, Tensor]) -> str:
        """Name the kinds of deltas in a network, as ``Adapter.state_dict`` gives it: ``LoRA``."""

    def merge_networks(self, networks: Sequence[tuple[Path, float]]) -> None:
        """Add the deltas of networks' files, each times its multiplier, to the frozen weights.

        On the meta device it only checks whether they fit.

        Raises:
            UserError: If one is no network for this model, is broken, or does not fit.
        """

    def diffusers_network(
        self, tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Name what ``Adapter.state_dict`` gives as diffusers' ``load_lora_weights`` wants it.

        Works on the meta device too. Beside the tensors, gives the metadata that diffusers needs.

        Raises:
            UserError: If diffusers cannot read such a network.
        """

    def sampler(self) -> ImageSampler:
        """Give what generates pictures.

        Made before the image encoder is released, it keeps the decoder.
        """

    def release_image_encoder(self) -> None:
        """Free the image encoder, once every latent is cached."""

    def release_text_encoders(self) -> None:
        """Free the text encoders, once every caption is cached."""

    def metadata(self) -> dict[str, str]:
        """Describe the base model for the header of saved files (``ss_*``, ``modelspec.*``).

        ``ss_base_weights`` lists what was merged into it, as JSON: ``name``, ``sha256`` and
        ``multiplier`` of each file.
        """


@runtime_checkable
class UnreadEncoders(Protocol):
    """What a :class:`LoadedModel` has beside if it reads its encoders only when they are needed.

    On the meta device the identities of its encoders are those that earlier starts found out. What
    none did is one that nothing was encoded by.
    """

    def read_encoders(self, *, images: bool, text: bool) -> None:
        """Read what will encode images, text or both, so that no fault in it shows later.

        Raises:
            UserError: If it cannot be read, or nothing can be trained on it.
        """


@runtime_checkable
class HasImageEncoder(Protocol):
    """What a :class:`LoadedModel` has beside if it tells which module encodes images.

    Else a plan cannot foretell how much memory that takes.
    """

    @property
    def image_encoder(self) -> nn.Module | None:
        """The module; None once it is released."""


@runtime_checkable
class LatentReader(Protocol):
    """What a :class:`LoadedModel` has beside if it can read latents that another program kept."""

    def read_latents(self, image: Path, size: tuple[int, int]) -> Mapping[bool, Tensor]:
        """Give the latents that lie beside an image, scaled for training; none if there are none.

        Args:
            image: The image.
            size: Its (width, height).

        Returns:
            fp32 [C, h, w], those of the mirrored image under True.

        Raises:
            ValueError: If there is a file, and it cannot be used; the message says why.
        """


class Adapter(Protocol):
    """A network attached to a model: the only thing that trains.

    A fresh adapter changes no output of the model. Outside of training (its modules in evaluation
    mode, no gradients recorded) nothing is dropped: the network acts as clients apply its file.
    """

    multiplier: float
    """How much of the network acts: 1 while training, 0 is the bare model. A layer's output is
    ``base + multiplier * (adapted - base)``."""

    def modules(self) -> Iterable[nn.Module]:
        """Give the network's own modules, whose ``train()`` and ``eval()`` decide on dropout."""

    def groups(self) -> Sequence[ParameterGroup]:
        """Give every trainable parameter exactly once, in groups no larger than a part."""

    def state_dict(self) -> dict[str, Tensor]:
        """Give the tensors of the saved file, under the names that clients read."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the tensors of a saved file. Strict: raises UserError for any other set of keys."""

    def metadata(self) -> dict[str, str]:
        """Describe the network for the header of saved files (``ss_network_*``)."""

    def prepare_step(self, timesteps: Tensor) -> None:
        """Learn the timesteps [B] of the batch that comes next, before the model predicts."""

    def detach(self) -> None:
        """Give the model back as it was before ``build``."""


@runtime_checkable
class LimitedAdapter(Protocol):
    """What an :class:`Adapter` has beside if its weights are to stay within bounds."""

    def limit_weights(self) -> Mapping[str, Tensor]:
        """Bring the weights back within their bounds; called after each optimizer step.

        Returns:
            What to log of it, by name: tensors without dimensions, on the device.
        """


class LimitedDelta(Protocol):
    """The delta of a layer, as :func:`limit_norms` keeps it below a norm."""

    def norm(self) -> Tensor:
        """Give the Frobenius norm of the delta weight, fp32 []."""

    def shrink(self, ratio: Tensor) -> None:
        """Multiply the delta weight in place, by a factor [] in [0, 1]."""


@runtime_checkable
class WeightAverage(Protocol):
    """What an observer's object has beside if it keeps an average of the weights.

    The average is saved as ``NAME-ema`` beside each network and is part of states.
    """

    def average_after(self, step: int) -> Sequence[Tensor]:
        """Give it as of the end of ``step``: fp32, in the order of ``run.assembly.parameters``.

        Asked when a file falls due, before ``step_finished`` is told, and again then.
        """

    def state_after(self, step: int) -> Mapping[str, Any]:
        """Give what :meth:`restore` needs: tensors, numbers and texts, nested."""

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Take up what a state kept; None if it kept no average. Weights are restored by then."""


class WeightFormat(Protocol):
    """How the weights of frozen linear layers and convolutions are stored.

    It works on the meta device too, for a plan.
    """

    name: str
    """Tells it from other formats: encodings that are kept depend on it."""

    def pack(self, weight: Tensor) -> Sequence[Tensor]:
        """Store a weight [out, in] or [out, in, h, w] as any tensors."""

    def unpack(self, packed: Sequence[Tensor], shape: Size, dtype: dtype) -> Tensor:
        """Give the values of a stored weight of this shape."""


@runtime_checkable
class MultiplyingFormat(Protocol):
    """What a :class:`WeightFormat` has beside if it multiplies without unpacking."""

    def can_multiply(self, shape: Size) -> bool:
        """Tell whether it can with a weight [out, in]."""

    def product(self, rows: Tensor, packed: Sequence[Tensor]) -> Tensor:
        """Give ``rows @ W.T`` for rows [n, in], in their dtype."""

    def product_back(self, gradient: Tensor, packed: Sequence[Tensor]) -> Tensor:
        """Give ``gradient @ W`` for a gradient [n, out], in its dtype."""


@runtime_checkable
class QuantizableModel(Protocol):
    """What a :class:`LoadedModel` has beside if its frozen weights can be stored otherwise."""

    def quantize(self, form: WeightFormat, *, denoiser_only: bool) -> None:
        """Store the weights of frozen layers in a format; before any network is attached."""


TimestepSampler: TypeAlias = "Callable[[int, Generator], LongTensor]"
NoiseTransform: TypeAlias = "Callable[[Tensor, Tensor, Tensor, Generator], Tensor]"
LossFunction: TypeAlias = "Callable[[Tensor, Tensor, Tensor], Tensor]"
WeightFunction: TypeAlias = "Callable[[Tensor], Tensor]"
