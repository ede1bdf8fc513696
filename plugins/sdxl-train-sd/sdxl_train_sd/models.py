"""The options of both families, and what only one of them has. Light to import."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from sdxl_train import Field, Problem
from sdxl_train.ldm import Family, LdmModel, TinyShape
from sdxl_train_sd.families import SD1, SD2, TINY1, TINY2

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_train import RunConfig


class _OneEncoder(LdmModel):
    """A family with one text encoder, trained at 512 pixels."""

    resolution: ClassVar[int | None] = 512

    text_encoder_lr: float | None = Field(
        None, ge=0, description="Rate of the text encoder. Default: learning_rate. 0: not adapted."
    )

    def text_rates(self) -> dict[str, float | None]:
        """Give the rate of the text encoder."""
        return {"te": self.text_encoder_lr}


class Sd1(_OneEncoder):
    """Stable Diffusion 1.x and its fine-tunes."""

    family: ClassVar[Family] = SD1
    tiny: ClassVar[TinyShape] = TINY1


class Sd2(_OneEncoder):
    """Stable Diffusion 2.x: 512 (noise) and, with v_parameterization, 768-v (velocity)."""

    family: ClassVar[Family] = SD2
    tiny: ClassVar[TinyShape] = TINY2
    chosen_by: ClassVar[frozenset[str]] = frozenset({"v2"})

    v2: bool = Field(True, description="Chooses this family; for sd-scripts' users.")

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Yield what is wrong with the options."""
        yield from super().check(config)
        if not self.v2:
            yield Problem(
                place=config.place("v2"),
                message="contradicts model_type = sd2",
                remedy="leave it out, or use --model_type sd1",
            )

    def remarks(self, config: RunConfig) -> Iterator[str]:
        """Yield what the options do that their user may not expect."""
        yield from super().remarks(config)
        if self.clip_skip not in (None, SD2.usual_layer):
            yield (
                f"{config.place('clip_skip')} trains on layer {self.clip_skip} from the last; "
                f"{SD2.title} and its clients use the last, which is the default: its text encoder "
                "comes without the layer that others skip"
            )
