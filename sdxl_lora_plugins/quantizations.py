"""How frozen weights are stored. Light to import."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from sdxl_train import Problem, Quantization

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_train import RunConfig, WeightFormat


class Unquantized(Quantization):
    """Frozen weights as they are, in the precision of the run."""

    default: ClassVar[bool] = True

    def remarks(self, config: RunConfig) -> Iterator[str]:
        """Say that a choice of parts has nothing to act on."""
        yield from super().remarks(config)
        if self.quantize_denoiser_only:
            place = config.place("quantize_denoiser_only")
            yield f"{place} has no effect without base_quantization"

    def build(self) -> None:
        """Build nothing: no weight is stored otherwise."""


class Fp8(Quantization):
    """8 bits: float8 with a scale for each output channel; unpacked when it is used."""

    chosen_by: ClassVar[frozenset[str]] = frozenset({"fp8_base", "fp8_base_unet"})

    def build(self) -> WeightFormat:
        """Build the format."""
        from sdxl_lora_plugins.fp8 import Fp8Format

        return Fp8Format()


class Fp8Matmul(Quantization):
    """The same, and linear layers multiply in float8, forward and backward: faster, coarser."""

    def machine_problems(self, config: RunConfig) -> Iterator[Problem]:
        """Refuse GPUs that cannot multiply so; torch computes it on every CPU, slowly."""
        device = config.device()
        if device.type == "cpu":
            return
        import torch

        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
        if capability < (8, 9):
            yield Problem(
                place=config.place("base_quantization"),
                message=f"fp8-matmul needs a GPU that multiplies float8 (compute capability 8.9 "
                f"or higher: Ada, Hopper, Blackwell), and this {device.type} device does not",
                remedy="use --base_quantization fp8, which stores the same and computes in the "
                "precision of the run",
            )

    def build(self) -> WeightFormat:
        """Build the format."""
        from sdxl_lora_plugins.fp8 import Fp8MatmulFormat

        return Fp8MatmulFormat()
