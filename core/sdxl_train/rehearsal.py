"""What a run computes, done once on tensors without data, to learn how much memory it takes.

Fake tensors have shapes, types and storages, so every option has the effect that it has in the run.
What is measured is what lives at once, operation by operation.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sdxl_train.assembly import WEIGHT_DTYPES, build_optimizer
from sdxl_train.errors import UserError
from sdxl_train.fused import FusedBackward
from sdxl_train.live_storages import LiveStorages
from sdxl_train.protocols import HasImageEncoder
from sdxl_train.rounding import WideSteps

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from sdxl_train.assembly import Assembly
    from sdxl_train.config import RunConfig
    from sdxl_train.data.buckets import Size


@dataclass(frozen=True, kw_only=True)
class StepBytes:
    """What a step takes beside the weights.

    Attributes:
        state: What the optimizer keeps from step to step.
        activations: What the forward pass keeps for the backward pass.
        passes: The most in both passes, with gradients and the optimizer's state.
        update: The most while the optimizer steps, with them too.
    """

    state: int
    activations: int
    passes: int
    update: int


class Rehearsal:
    """Computes with an assembly that has no weights.

    Args:
        config: The run's options.
        assembly: On the meta device. Its tensors become fake ones.
        device: Where the run computes.
    """

    def __init__(self, config: RunConfig, assembly: Assembly, device: torch.device) -> None:
        self._config, self._device = config, device
        self._model, self._adapter = assembly.model, assembly.adapter
        self._trains_text = any(p.module is not self._model.denoiser for p in self._model.parts)
        side = 8 * self._model.latent_scale
        self._channels = self._model.encode_images(torch.empty(1, 3, side, side)).shape[1]
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._live = LiveStorages(device)
        encoder = self._model.image_encoder if isinstance(self._model, HasImageEncoder) else None
        modules = [self._model.denoiser, *self._model.text_encoders, *self._adapter.modules()]
        modules += [] if encoder is None else [encoder]
        before = [parameter for module in modules for parameter in module.parameters()]
        for module in modules:
            module._apply(self._without_data)  # type: ignore[no-untyped-call]
        after = [parameter for module in modules for parameter in module.parameters()]
        self._live.add([*after, *(buffer for module in modules for buffer in module.buffers())])
        fake = dict(zip(map(id, before), after, strict=True))
        self._groups = [
            {**group, "params": [fake[id(parameter)] for parameter in group["params"]]}
            for group in assembly.groups
        ]

    def _without_data(self, tensor: Tensor) -> Tensor:
        """Give a fake tensor of the same shape; an operation that makes one takes a millisecond."""
        fake: Tensor = FakeTensor(self._fake, tensor.detach().to("meta"), self._device)
        return fake

    def encode_images(self, batch_size: int, size: Size) -> int:
        """Give the bytes that encoding images of (width, height) takes at most."""
        with self._computing(autocast=False) as start, torch.no_grad():
            pixels = torch.empty(batch_size, 3, size[1], size[0])
            self._model.encode_images(pixels.to(self._device))
            return self._live.peak - start

    def encode_text(self, batch_size: int) -> int:
        """Give the bytes that encoding captions takes at most."""
        with self._computing() as start, torch.no_grad():
            self._model.encode_text([""] * batch_size)
            return self._live.peak - start

    def step(self, batch_size: int, size: Size) -> StepBytes:
        """Give what a step of images of (width, height) takes, once there was one before.

        Raises:
            UserError: If the optimizer cannot step on tensors without data.
        """
        training = self._config.training
        with self._computing() as start:
            optimizer = build_optimizer(self._config, self._groups)
            if self._config.optimizer.train_eval_modes:
                optimizer.train()  # type: ignore[attr-defined]
            if training.trained_precision != "no":
                # It draws what it rounds by, which needs no stream of its own here.
                generator = torch.Generator(self._device)
                WideSteps(optimizer, WEIGHT_DTYPES[training.trained_precision], lambda _: generator)
                start = self._live.now
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.empty_like(parameter)
            self._update(optimizer)
            update = self._live.peak - start
            if training.gradient_accumulation_steps == 1:
                optimizer.zero_grad(set_to_none=True)
            state = self._live.now - start
            if training.fused_backward_pass:
                FusedBackward(optimizer, training.max_grad_norm)
                update = 0
            self._live.begin()
            loss = self._loss(batch_size, size)
            activations = self._live.now - start - state
            loss.backward()  # type: ignore[no-untyped-call]
            passes = self._live.peak - start
        return StepBytes(state=state, activations=activations, passes=passes, update=update)

    def _update(self, optimizer: torch.optim.Optimizer) -> None:
        """Step an optimizer, whose author may not have thought of tensors without data.

        Raises:
            UserError: If it fails.
        """
        try:
            optimizer.step()
        except Exception as error:
            raise UserError.of(
                self._config.place("optimizer_type"),
                f"what {self._config.name_of('optimizer')} keeps cannot be foretold: it fails on "
                f"tensors without data ({type(error).__name__}: {error})",
                "plan without --memory",
            ) from error

    def _loss(self, batch_size: int, size: Size) -> Tensor:
        """Compute what is trained: the mean of squares stands for every loss."""
        with torch.set_grad_enabled(self._trains_text):
            condition = self._model.encode_text([""] * batch_size)
        pixels = torch.zeros(batch_size, 2, dtype=torch.int64, device=self._device)
        condition |= dict.fromkeys(("original_size", "crop_top_left", "target_size"), pixels)
        scale = self._model.latent_scale
        shape = (batch_size, self._channels, size[1] // scale, size[0] // scale)
        noisy = torch.empty(shape, device=self._device)
        timesteps = torch.zeros(batch_size, dtype=torch.int64, device=self._device)
        self._adapter.prepare_step(timesteps)
        return self._model.predict(noisy, timesteps, condition).square().mean()

    @contextmanager
    def _computing(self, *, autocast: bool = True) -> Iterator[int]:
        """Compute without data as the run does; give the bytes that live at the start."""
        precision = self._config.training.mixed_precision
        enabled = autocast and precision != "no"
        with (
            self._fake,
            self._live,
            torch.autocast(self._device.type, WEIGHT_DTYPES[precision], enabled=enabled),
        ):
            self._live.begin()
            yield self._live.now
