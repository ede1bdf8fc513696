"""The loop to compare with: diffusers and peft, as diffusers' SDXL LoRA example trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from peft import LoraConfig
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sdxl_lora_plugins.commands.bench_figures import DTYPES, adapted_layers
from sdxl_lora_plugins.made_up_parts import fill_in, full_parts, text_shapes
from sdxl_lora_plugins.model import SDXL, TINY
from sdxl_train import shows_bars
from sdxl_train.ldm import tiny_parts

if TYPE_CHECKING:
    from torch import Tensor

    from sdxl_lora_plugins.commands.bench_figures import Stopwatch, Work

_TOKENS: Final = 77


class _Samples(Dataset[dict[str, "Tensor"]]):
    """One sample, many times."""

    def __init__(self, sample: dict[str, Tensor], count: int) -> None:
        self.sample = sample
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.sample


class PlainLoop:
    """The same work as a run's: base model, adapted layers, rank, sizes and precision.

    Args:
        work: Of the run.
        tiny: With the tiny model.
    """

    def __init__(self, work: Work, *, tiny: bool) -> None:
        self.work = work
        self.tiny = tiny
        config = work.config
        self.precision = config.training.mixed_precision
        self.batch_size = config.dataset.train_batch_size
        self.accumulation = config.training.gradient_accumulation_steps

    def train(self, steps: int, stopwatch: Stopwatch) -> None:
        """Train for some optimizer steps."""
        accelerator = Accelerator(
            mixed_precision=self.precision,
            gradient_accumulation_steps=self.accumulation,
            cpu=self.work.device.type == "cpu",
        )
        unet = self._unet()
        trained = [p for p in unet.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=self.work.config.optimizer.learning_rate, weight_decay=1e-2
        )
        schedule = get_scheduler("constant", optimizer=optimizer)
        noise_scheduler = DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        )
        count = steps * self.batch_size * self.accumulation
        loader: Any = DataLoader(_Samples(self._sample(unet), count), batch_size=self.batch_size)
        unet, optimizer, loader, schedule = accelerator.prepare(unet, optimizer, loader, schedule)
        bar, train_loss = tqdm(total=steps, desc="plain loop", disable=not shows_bars()), 0.0
        unet.train()
        for batch in loader:
            if accelerator.sync_gradients or bar.n == 0:
                stopwatch.lap("data")
            with accelerator.accumulate(unet):
                loss = self._loss(unet, noise_scheduler, batch)
                mean = accelerator.gather(loss.repeat(self.batch_size)).mean()
                train_loss += mean.item() / self.accumulation
                stopwatch.lap("forward")
                accelerator.backward(loss)
                stopwatch.lap("backward")
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                stopwatch.lap("optimizer")
                bar.update(1)
                accelerator.log({"train_loss": train_loss}, step=bar.n)
                train_loss = 0.0
                bar.set_postfix(step_loss=loss.detach().item(), lr=schedule.get_last_lr()[0])
                stopwatch.lap("logging")
        bar.close()

    def _unet(self) -> Any:
        parts = tiny_parts(SDXL, TINY) if self.tiny else full_parts("sdpa")
        unet: Any = parts.unet
        fill_in(unet, self.work.device, DTYPES[self.precision])
        unet.requires_grad_(False)
        if self.work.config.model.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        config = LoraConfig(
            r=self.work.rank,
            lora_alpha=self.work.rank,
            init_lora_weights="gaussian",
            target_modules=list(adapted_layers(unet)),
        )
        unet.add_adapter(config)
        # As the example does for mixed precision: what trains is fp32.
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.float()
        return unet

    def _sample(self, unet: Any) -> dict[str, Tensor]:
        w, h = self.work.resolution
        text = text_shapes(unet, 1, _TOKENS - 2)
        return {
            "latents": torch.randn(4, h // 8, w // 8),
            **{name: torch.randn(shape[1:]) for name, shape in text.items()},
            "time_ids": torch.tensor([h, w, 0, 0, h, w]),
        }

    def _loss(self, unet: Any, schedule: DDPMScheduler, batch: dict[str, Tensor]) -> Tensor:
        latents, dtype = batch["latents"], DTYPES[self.precision]
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device)
        noisy = schedule.add_noise(latents, noise, timesteps)
        predicted = unet(
            noisy.to(dtype),
            timesteps,
            batch["context"].to(dtype),
            added_cond_kwargs={
                "text_embeds": batch["pooled"].to(dtype),
                "time_ids": batch["time_ids"],
            },
            return_dict=False,
        )[0]
        return F.mse_loss(predicted.float(), noise.float(), reduction="mean")
