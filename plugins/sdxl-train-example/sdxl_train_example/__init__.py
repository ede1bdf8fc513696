"""Example for sdxl-train."""

from __future__ import annotations

from sdxl_train import (
    Command,
    Loss,
    Model,
    Network,
    Noise,
    Observer,
    Optimizer,
    Quantization,
    Scheduler,
    Timesteps,
    Weighting,
    hookimpl,
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


@hookimpl
def register_models() -> dict[str, type[Model]]:
    """Give this model by its name."""
    return {"example": ExampleModel}


@hookimpl
def register_quantizations() -> dict[str, type[Quantization]]:
    """Give this quantization by its name."""
    return {"example": ExampleQuantization}


@hookimpl
def register_networks() -> dict[str, type[Network]]:
    """Give this network by its name."""
    return {"example": ExampleNetwork}


@hookimpl
def register_optimizers() -> dict[str, type[Optimizer]]:
    """Give this optimizer by its name."""
    return {"example": ExampleOptimizer}


@hookimpl
def register_schedulers() -> dict[str, type[Scheduler]]:
    """Give this scheduler by its name."""
    return {"example": ExampleScheduler}


@hookimpl
def register_timesteps() -> dict[str, type[Timesteps]]:
    """Give this timesteps by its name."""
    return {"example": ExampleTimesteps}


@hookimpl
def register_noises() -> dict[str, type[Noise]]:
    """Give this noise by its name."""
    return {"example": ExampleNoise}


@hookimpl
def register_losses() -> dict[str, type[Loss]]:
    """Give this loss by its name."""
    return {"example": ExampleLoss}


@hookimpl
def register_weightings() -> dict[str, type[Weighting]]:
    """Give this weighting by its name."""
    return {"example": ExampleWeighting}


@hookimpl
def register_observers() -> dict[str, type[Observer]]:
    """Give this observer by its name."""
    return {"example": ExampleObserver}


@hookimpl
def register_commands() -> dict[str, type[Command]]:
    """Give this command by its name."""
    return {"example": ExampleCommand}
