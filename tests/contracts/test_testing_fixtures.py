"""The fixtures of the kit run the real thing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sdxl_train.testing import TrainTiny, WritePlugin

LOUD = """
import torch
from sdxl_train import Field, Noise, hookimpl


class Loud(Noise):
    \"\"\"Louder noise.\"\"\"

    loudness: float = Field(1.0, ge=0, description="Factor of the noise.")

    def build(self, schedule):
        return lambda noise, latents, timesteps, generator: self.loudness * noise


@hookimpl
def register_noises():
    return {"loud": Loud}
"""


def test_tiny_run_trains_with_a_plugin_file(
    train_tiny: TrainTiny, plugin_files: WritePlugin
) -> None:
    plugin = plugin_files(LOUD, "loud")
    plain = train_tiny(network_train_unet_only=True)
    loud = train_tiny(network_train_unet_only=True, plugin=plugin, loudness=3.0)

    assert len(plain.losses) == len(loud.losses) == plain.result.steps == 3
    # The target is three times the noise, so its square is nine times as large.
    assert loud.losses[0] > 4 * plain.losses[0]
    assert plain.tensors.keys() == loud.tensors.keys()
    assert any(not torch.equal(loud.tensors[key], plain.tensors[key]) for key in plain.tensors)
    assert plain.metadata["ss_network_dim"] == "4"
