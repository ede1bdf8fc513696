"""Each component keeps the contract of its kind: what sdxl-train relies on."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from sdxl_train.testing import (
    CommandContract,
    LossContract,
    ModelContract,
    NetworkContract,
    NoiseContract,
    ObserverContract,
    OptimizerContract,
    QuantizationContract,
    SchedulerContract,
    TimestepsContract,
    WeightingContract,
)

from sdxl_train_example.command import ExampleCommand
from sdxl_train_example.loss import ExampleLoss
from sdxl_train_example.model import ExampleModel
from sdxl_train_example.network import ExampleNetwork
from sdxl_train_example.noise import ExampleNoise
from sdxl_train_example.observer import ExampleObserver
from sdxl_train_example.optimizer import ExampleOptimizer
from sdxl_train_example.quantization import ExampleQuantization
from sdxl_train_example.scheduler import ExampleScheduler
from sdxl_train_example.timesteps import ExampleTimesteps
from sdxl_train_example.weighting import ExampleWeighting


class TestExampleCommand(CommandContract):
    component = ExampleCommand
    options = {"network": Path("network.safetensors")}
    mistakes = [{"network": Path("gone.safetensors")}, {"network": Path("broken.safetensors")}]

    def prepare(self, folder: Path) -> None:
        save_file({"one": torch.zeros(2, 3)}, folder / "network.safetensors")
        (folder / "broken.safetensors").write_bytes(b"broken")


class TestExampleLoss(LossContract):
    component = ExampleLoss


class TestExampleModel(ModelContract):
    component = ExampleModel


class TestExampleNetwork(NetworkContract):
    component = ExampleNetwork
    loads_in_diffusers = True


class TestExampleNoise(NoiseContract):
    component = ExampleNoise
    options = {"example_offset": 0.1}


class TestExampleObserver(ObserverContract):
    component = ExampleObserver
    options = {"example_losses": True}


class TestExampleOptimizer(OptimizerContract):
    component = ExampleOptimizer


class TestExampleQuantization(QuantizationContract):
    component = ExampleQuantization


class TestExampleScheduler(SchedulerContract):
    component = ExampleScheduler
    ends_at = 0.0


class TestExampleTimesteps(TimestepsContract):
    component = ExampleTimesteps


class TestExampleWeighting(WeightingContract):
    component = ExampleWeighting
    options = {"example_signal_power": 0.5}
