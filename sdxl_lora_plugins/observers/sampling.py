"""Take sample pictures and write them, at the times that are due."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdxl_lora_plugins.observers.prompts import rounded
from sdxl_train import ImageRequest, SampledImage, __version__, derive_seed
from sdxl_train.ldm import SAMPLERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from sdxl_lora_plugins.observers.prompts import SamplePrompt
    from sdxl_lora_plugins.observers.samples import SampleImages
    from sdxl_train import Run, StepResult

logger = logging.getLogger(__name__)


class Sampling:
    """Samples the prompts of one run, dealt to its processes.

    Prompts are encoded once if no text encoder trains: the encoders may be released afterwards.
    """

    def __init__(self, options: SampleImages, run: Run, prompts: Sequence[SamplePrompt]) -> None:
        self.options = options
        self.run = run
        self.model = run.assembly.model
        self.seeded = [prompt.options.seed is not None for prompt in prompts]
        self.requests = [self._request(index, prompt) for index, prompt in enumerate(prompts)]
        self.sampler = self.model.sampler()
        self.due = frozenset(options.sample_steps(run.counts))
        self._texts: list[Mapping[str, Tensor]] | None = None
        if all(part.module is self.model.denoiser for part in self.model.parts):
            with run.evaluation():
                self._texts = [self._encode(request) for request in self.requests]

    def run_started(self) -> None:
        """Sample before the first step of a run that starts at the beginning."""
        if self.run.first_step == 0 and 0 in self.due:
            self._sample(0, 0)

    def step_finished(self, step: StepResult) -> None:
        """Sample if it is time."""
        if step.step in self.due:
            self._sample(step.step, step.epoch)

    def _sample(self, step: int, epoch: int) -> None:
        """Draw the pictures, each in one of the processes; the main one writes them."""
        started = time.monotonic()
        numbers = range(len(self.requests))
        images = []
        with self.run.evaluation():
            for index, drawn in self.run.share_out(numbers, self._draw_each):
                if self.run.main:
                    images.append(self._keep(index, drawn, step, epoch))
        if not self.run.main:
            return
        if len(images) < len(numbers):
            logger.warning(
                "sampling ends early: %d pictures are left out", len(numbers) - len(images)
            )
        logger.info(
            "sampled %d pictures after step %d in %.1f s, in %s",
            sum(image.path is not None for image in images),
            step,
            time.monotonic() - started,
            self._folder,
        )
        self.run.tell("images_sampled", run=self.run, images=images)

    def _draw_each(self, numbers: Sequence[int]) -> Iterator[tuple[int, Drawn]]:
        for index in numbers:
            if self.run.stopping():
                return
            yield index, self._draw(index)

    def _draw(self, index: int) -> Drawn:
        request = self.requests[index]
        self.run.assembly.adapter.multiplier = request.multiplier
        try:
            text = self._texts[index] if self._texts else self._encode(request)
            return Drawn.of(self.sampler(request, text))
        except Exception as error:  # noqa: BLE001 - other pictures may succeed
            # Out of memory at this size; and samplers raise all there is (IndexError, TypeError)
            # where the steps are too few for them.
            return Drawn(fault=f"failed: {type(error).__name__}: {error}")

    def _keep(self, index: int, drawn: Drawn, step: int, epoch: int) -> SampledImage:
        """Write a picture, if there is one, and say what is wrong with it, if anything."""
        request, path, fault = self.requests[index], None, drawn.fault
        if drawn.pixels is not None:
            try:
                path = self._write(drawn.pixels, index, request, step, epoch)
            except OSError as error:  # a full disk
                fault = f"failed: {type(error).__name__}: {error}"
        if fault:
            logger.warning("sample %d after step %d (%.60s) %s", index, step, request.prompt, fault)
        return SampledImage(
            request=request, index=index, step=step, epoch=epoch, path=path, fault=fault
        )

    def _encode(self, request: ImageRequest) -> Mapping[str, Tensor]:
        return self.model.encode_prompts([request.prompt, request.negative_prompt])

    def _request(self, index: int, prompt: SamplePrompt) -> ImageRequest:
        """Fill in what a prompt leaves open; a seed so that its pictures can be compared."""
        options = prompt.options
        width, height = self.run.resolution
        seed = options.seed
        return ImageRequest(
            prompt=options.prompt,
            negative_prompt=options.negative_prompt,
            width=prompt.side("width") or rounded(width),
            height=prompt.side("height") or rounded(height),
            steps=options.sample_steps,
            guidance_scale=options.scale,
            seed=derive_seed(self.run.seed, "sampling", index) % 2**32 if seed is None else seed,
            sampler=options.sample_sampler or self.options.sample_sampler,
            multiplier=options.multiplier,
        )

    @property
    def _folder(self) -> Path:
        return self.run.output_dir / "sample"

    def _write(
        self, pixels: Tensor, index: int, request: ImageRequest, step: int, epoch: int
    ) -> Path:
        """Write a PNG named as sd-scripts does."""
        named = self.run.config.output.output_name
        by_epoch = self.options.names_epoch(step, self.run.counts)
        parts = [
            *([named] if named else []),
            f"e{epoch:06d}" if by_epoch else f"{step:06d}",
            f"{index:02d}",
            time.strftime("%Y%m%d%H%M%S"),
            *([str(request.seed)] if self.seeded[index] else []),
        ]
        path = self._folder / f"{'_'.join(parts)}.png"
        path.parent.mkdir(exist_ok=True)
        info = PngInfo()
        # Not add_text: its Latin-1 knows few of the world's prompts.
        info.add_itxt("parameters", self._parameters(request, step))
        Image.fromarray(pixels.numpy()).save(path, pnginfo=info)
        return path

    def _parameters(self, request: ImageRequest, step: int) -> str:
        """Describe a picture in the form of A1111's web UI, which most viewers read."""
        model = self.model.metadata()
        facts = {
            "Steps": request.steps,
            "Sampler": SAMPLERS[request.sampler].title,  # type: ignore[index]
            "CFG scale": f"{request.guidance_scale:g}",
            "Seed": request.seed,
            "Size": f"{request.width}x{request.height}",
            "Model hash": model.get("ss_new_sd_model_hash", "")[:10],
            "Model": model.get("ss_sd_model_name", ""),
            "Network": self.run.name,
            "Network step": step,
            "Network multiplier": f"{request.multiplier:g}",
            "Version": f"sdxl-train {__version__}",
        }
        lines = [request.prompt]
        if request.negative_prompt:
            lines.append(f"Negative prompt: {request.negative_prompt}")
        lines.append(", ".join(f"{name}: {fact}" for name, fact in facts.items() if fact != ""))
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What came of drawing a picture.

    Attributes:
        pixels: uint8 [H, W, 3] on the CPU, unless it failed or is not finite.
        fault: What is wrong, if anything.
    """

    pixels: Tensor | None = None
    fault: str | None = None

    @classmethod
    def of(cls, picture: Tensor) -> Drawn:
        """Look at a picture [3, H, W] in [0, 1]."""
        broken = "is the VAE or the network broken?"
        if not torch.isfinite(picture).all():
            return cls(fault=f"is not finite (NaN), so it was not written: {broken}")
        pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
        darkest, brightest = pixels.amin(), pixels.amax()
        constant = f"is of one colour ({darkest.item()}): {broken}"
        return cls(pixels=pixels, fault=constant if darkest == brightest else None)
