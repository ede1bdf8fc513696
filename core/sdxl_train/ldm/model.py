"""The options that families of latent-diffusion models share, and what can be wrong with them.

Light to import.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from sdxl_train.errors import Problem
from sdxl_train.ldm import sources
from sdxl_train.ldm.headers import BadFileError
from sdxl_train.ldm.lean_imports import lean_imports
from sdxl_train.ldm.memory import MemoryOptions
from sdxl_train.ldm.prediction import Said, said_by

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import device, dtype

    from sdxl_train.config import RunConfig
    from sdxl_train.ldm.family import Family, TinyShape
    from sdxl_train.ldm.headers import Fault
    from sdxl_train.ldm.loaded import LoadedLdm
    from sdxl_train.schedule import PredictionType


class LdmModel(MemoryOptions):
    """A family of latent-diffusion models; a subclass says which, and has ``text_encoder_lr``."""

    family: ClassVar[Family]
    """What it is."""
    tiny: ClassVar[TinyShape]
    """How large its tiny model is."""
    may_change: ClassVar[frozenset[str]] = MemoryOptions.may_change | {"vae", "tokenizer_cache_dir"}

    vae: str | None = Field(
        None, description="VAE in place of the model's own: a .safetensors file, folder or hub id."
    )
    vae_dtype: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Precision of the VAE. Some overflow in fp16."
    )
    no_half_vae: bool = Field(
        False, description="Insist on the VAE in fp32, which is the default; for sd-scripts users."
    )
    v_parameterization: bool | None = Field(
        None, description="The model predicts velocity. Default: as the model says of itself."
    )
    zero_terminal_snr: bool | None = Field(
        None,
        description="Train on a noise schedule whose last timestep is pure noise. Default: as the "
        "model says of itself.",
    )
    tokenizer_cache_dir: Path | None = Field(
        None,
        description="Folder with tokenizers for single-file models, filled if empty. Default: the "
        "vocabulary that comes with this program.",
    )
    max_token_length: Literal[75, 150, 225] | None = Field(
        None, description="Tokens of a caption that are read. Default: 75."
    )
    clip_skip: int | None = Field(
        None,
        ge=1,
        le=12,
        description="Layer of the text encoders whose output is used, counted from the last as 1. "
        "Default: the one on which the family was trained.",
    )
    weighted_captions: bool = Field(
        False, description="Read weights in captions: (word:1.2), (more), [less]. \\( is a bracket."
    )
    unet_lr: float | None = Field(
        None, ge=0, description="Rate of the U-Net. Default: learning_rate. 0: not adapted."
    )
    network_train_unet_only: bool = Field(False, description="Adapt the U-Net only.")
    network_train_text_encoder_only: bool = Field(
        False, description="Adapt the text encoders only."
    )

    @abstractmethod
    def text_rates(self) -> Mapping[str, float | None]:
        """Give the rate of each text encoder by the name of its part; None: ``learning_rate``."""

    def rates(self) -> dict[str, float | None]:
        """Give the rate of each part that is adapted; None stands for ``learning_rate``.

        The keys are ``unet`` and the names of text encoders. A part whose own rate is 0 is left
        out.
        """
        rates: dict[str, float | None] = {}
        if not self.network_train_text_encoder_only:
            rates["unet"] = self.unet_lr
        if not self.network_train_unet_only:
            rates.update(self.text_rates())
        return {name: rate for name, rate in rates.items() if rate != 0}

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Yield what is wrong with the sources, from their headers, and with the rates."""
        yield from self._source_problems(config)
        if self.no_half_vae and self.vae_dtype != "fp32":
            yield Problem(
                place=config.place("no_half_vae"),
                message=f"contradicts vae_dtype = {self.vae_dtype}: no_half_vae means fp32",
                remedy=f"drop it, or {config.place('vae_dtype')}",
            )
        yield from self._network_problems(config)
        yield from self.memory_problems(config)
        num_levels = len(self.family.layout.attention)
        if any(level >= num_levels for level in self.checkpoint_levels or ()):
            yield Problem(
                place=config.place("checkpoint_levels"),
                message=f"got {self.checkpoint_levels}, and the U-Net of {self.family.title} has "
                f"the levels 0 to {num_levels - 1}",
            )
        yield from self._check_training(config)

    def _source_problems(self, config: RunConfig) -> Iterator[Problem]:
        """Yield what is wrong with the files of the model, by their headers."""
        base = sources.locate(self.pretrained_model_name_or_path)
        if not base.downloadable:
            place = config.place("pretrained_model_name_or_path")
            faults = sources.base_faults(base, self.family, vae_given=self.vae is not None)
            yield from _problems(place, faults)
        if self.vae is not None and not (vae := sources.locate(self.vae)).downloadable:
            yield from _problems(config.place("vae"), sources.vae_faults(vae, self.family))

    def block_names(self) -> Sequence[str]:
        """Name the U-Net's blocks in the order in which users give values by block."""
        return self.family.blocks

    def predicts(self) -> PredictionType | None:
        """Give what the U-Net predicts: by the option, else by what the model says of itself."""
        return self.prediction_type(said) if (said := self._said()) is not None else None

    def prediction_type(self, said: Said) -> PredictionType:
        """Choose what the U-Net predicts, knowing what the model says of itself."""
        if self.v_parameterization is None:
            return said.prediction_type or "epsilon"
        return "v_prediction" if self.v_parameterization else "epsilon"

    def has_zero_terminal_snr(self, said: Said) -> bool:
        """Choose the noise schedule, knowing what the model says of itself."""
        if self.zero_terminal_snr is None:
            return said.zero_terminal_snr
        return self.zero_terminal_snr

    def remarks(self, config: RunConfig) -> Iterator[str]:
        """Yield where the options and the model's own word differ, and what has no effect."""
        yield from self._idle_rates(config)
        encoders = [name for name in self.rates() if name != "unet"]
        if config.is_set("text_encoder_batch_size") and encoders:
            yield (
                f"{config.place('text_encoder_batch_size')} has no effect: a text encoder trains, "
                "and encodes whole batches"
            )
        yield from self.memory_remarks(config)
        said = self._said()
        if said is None:
            return
        chosen = self.prediction_type(said)
        if said.prediction_type not in (None, chosen):
            yield (
                f"{config.place('v_parameterization')} trains {chosen}, but "
                f"{said.prediction_place} says {said.prediction_type}"
            )
        if self.zero_terminal_snr is False and said.zero_terminal_snr:
            yield (
                f"{config.place('zero_terminal_snr')} = false, but the model was made for zero "
                f"terminal SNR ({said.schedule_place})"
            )
        if self.has_zero_terminal_snr(said) and chosen == "epsilon":
            yield (
                f"{config.place('zero_terminal_snr')} is meant for models that predict velocity: "
                f"from pure noise, the last timestep, there is nothing to learn about noise; add "
                f"{config.place('v_parameterization')} if this one predicts velocity"
            )

    def _said(self) -> Said | None:
        """Read what the model says of itself; None where it cannot be read here and now."""
        source = sources.locate(self.pretrained_model_name_or_path)
        try:
            return None if source.path is None else said_by(source, pickles=self.family.pickles)
        except BadFileError:  # a problem of its own, which `check` reports
            return None

    def _idle_rates(self, config: RunConfig) -> Iterator[str]:
        """Name the rates that a flag makes idle: sd-scripts' users keep them in their commands."""
        idle: dict[str, list[str]] = {
            "network_train_unet_only": self._text_rate_options(),
            "network_train_text_encoder_only": ["unet_lr"],
        }
        for flag, names in idle.items():
            for name in names:
                if getattr(self, flag) and getattr(self, name):
                    yield f"{config.place(name)} has no effect: {config.place(flag)} is set"

    def build(self, device: device | str, dtype: dtype) -> LoadedLdm:
        """Load the model with its frozen weights in ``dtype``, the VAE in ``vae_dtype``.

        Raises:
            UserError: If a source is not what it must be, or is incomplete.
        """
        import torch

        with lean_imports():
            from sdxl_train.ldm.loading import load

        return load(self, torch.device(device), dtype)

    @classmethod
    def write_tiny(cls, path: Path, *, seed: int = 0) -> Path:
        """Write a tiny model as a diffusers folder; see :mod:`.tiny`."""
        with lean_imports():
            from sdxl_train.ldm.tiny import write_tiny

        return write_tiny(path, cls.family, cls.tiny, seed=seed)

    @classmethod
    def _text_rate_options(cls) -> list[str]:
        return [name for name in cls.model_fields if name.startswith("text_encoder_lr")]

    def _listed(self, names: list[str]) -> str:
        return " and ".join(self.family.part_title(name) for name in names)

    def _check_training(self, config: RunConfig) -> Iterator[Problem]:
        """Yield what is wrong with the choice of parts to adapt."""
        if self.network_train_unet_only and self.network_train_text_encoder_only:
            yield Problem(
                place=config.place("network_train_unet_only"),
                message="contradicts network_train_text_encoder_only: nothing would be trained",
                remedy="drop one of the two",
            )
            return
        default = config.optimizer.learning_rate
        trained = [name for name, rate in self.rates().items() if (rate or default) > 0]
        idle = [name for name in self.rates() if name not in trained]
        if not trained:
            yield Problem(
                place=config.place("learning_rate"),
                message="nothing is left to train: every rate is 0 (learning_rate, unet_lr, "
                f"{', '.join(self._text_rate_options())})",
                remedy="give a rate above 0 to a part that network_train_unet_only or "
                "network_train_text_encoder_only does not exclude",
            )
        elif idle:
            yield Problem(
                place=config.place("learning_rate"),
                message=f"is 0, and {self._listed(idle)} would be trained at it without ever "
                "learning",
                remedy="give a rate above 0, or set unet_lr or text_encoder_lr to 0 as well",
            )
        encoders = [name for name in self.rates() if name != "unet"]
        if config.dataset.caches_text and encoders:
            yield Problem(
                place=config.place("cache_text_encoder_outputs"),
                message=f"outputs cannot be cached while {self._listed(encoders)} are trained"
                if len(encoders) > 1
                else f"outputs cannot be cached while {self._listed(encoders)} is trained",
                remedy="add --network_train_unet_only, or set --text_encoder_lr 0, or drop "
                "cache_text_encoder_outputs",
            )

    def _network_problems(self, config: RunConfig) -> Iterator[Problem]:
        """Yield what is wrong with the files of networks that the run begins with."""
        from sdxl_train.ldm.files.opening import open_networks

        network = config.network
        begins = [network.network_weights] if network.network_weights else []
        problems: list[Problem] = []
        open_networks(begins, self.family, problems, config.place("network_weights"))
        merged = network.base_weights or []
        open_networks(merged, self.family, problems, config.place("base_weights"))
        yield from problems


def _problems(place: str, faults: Iterator[Fault]) -> Iterator[Problem]:
    for fault in faults:
        yield Problem(place=place, message=fault.message, remedy=fault.remedy)
