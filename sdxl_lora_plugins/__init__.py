"""The built-in plugin: what is specific to SDXL, and one good component of each kind.

It registers by the same entry point and the same hooks as every other plugin, and imports only
``sdxl_train``'s public names. Hook implementations only; the components are in their own modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_lora_plugins import (
    losses,
    model,
    networks,
    noises,
    optimizers,
    quantizations,
    schedulers,
    timesteps,
    weightings,
)
from sdxl_lora_plugins.commands.bench import Bench
from sdxl_lora_plugins.commands.compare import Compare
from sdxl_lora_plugins.commands.convert import Convert
from sdxl_lora_plugins.commands.demo import Demo
from sdxl_lora_plugins.commands.extract import Extract
from sdxl_lora_plugins.commands.inspect import Inspect
from sdxl_lora_plugins.commands.merge import Merge
from sdxl_lora_plugins.commands.new_plugin import NewPlugin
from sdxl_lora_plugins.commands.resize import Resize
from sdxl_lora_plugins.observers.ema import Ema
from sdxl_lora_plugins.observers.hub import HubUpload
from sdxl_lora_plugins.observers.progress import Progress
from sdxl_lora_plugins.observers.report import Report
from sdxl_lora_plugins.observers.samples import SampleImages
from sdxl_lora_plugins.observers.trackers import Trackers
from sdxl_train import hookimpl

if TYPE_CHECKING:
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
    )


@hookimpl
def register_models() -> dict[str, type[Model]]:
    """Give the model families."""
    return {"sdxl": model.Sdxl}


@hookimpl
def register_quantizations() -> dict[str, type[Quantization]]:
    """Give the formats of frozen weights."""
    return {
        "none": quantizations.Unquantized,
        "fp8": quantizations.Fp8,
        "fp8-matmul": quantizations.Fp8Matmul,
    }


@hookimpl
def register_networks() -> dict[str, type[Network]]:
    """Give the networks, also under sd-scripts' module path."""
    return {
        "lora": networks.Lora,
        "networks.lora": networks.Lora,
        "locon": networks.Locon,
        "lokr": networks.Lokr,
        "networks.lokr": networks.Lokr,
    }


@hookimpl
def register_optimizers() -> dict[str, type[Optimizer]]:
    """Give the optimizers, those of torch also under their paths."""
    named: dict[str, type[Optimizer]] = {
        "AdamW": optimizers.AdamW,
        "Adam": optimizers.Adam,
        "NAdam": optimizers.NAdam,
        "RAdam": optimizers.RAdam,
        "Adamax": optimizers.Adamax,
        "Adagrad": optimizers.Adagrad,
        "Adadelta": optimizers.Adadelta,
        "RMSprop": optimizers.RMSprop,
        "SGD": optimizers.Sgd,
        "ASGD": optimizers.OfTorch.of("torch.optim.ASGD"),
        "Rprop": optimizers.OfTorch.of("torch.optim.Rprop"),
        "Muon": optimizers.OfTorch.of("torch.optim.Muon"),
    }
    paths = {f"torch.optim.{name}": optimizer for name, optimizer in named.items()}
    others: dict[str, type[Optimizer]] = {
        "SGDNesterov": optimizers.SgdNesterov,
        "Adafactor": optimizers.Adafactor,
        "transformers.optimization.Adafactor": optimizers.Adafactor,
    }
    return named | others | paths


@hookimpl
def register_schedulers() -> dict[str, type[Scheduler]]:
    """Give the learning-rate schedules."""
    return {
        "constant": schedulers.Constant,
        "constant_with_warmup": schedulers.ConstantWithWarmup,
        "linear": schedulers.Linear,
        "cosine": schedulers.Cosine,
        "cosine_with_restarts": schedulers.CosineWithRestarts,
        "cosine_with_min_lr": schedulers.CosineWithMinLr,
        "cosine_warmup_with_min_lr": schedulers.CosineWarmupWithMinLr,
        "polynomial": schedulers.Polynomial,
        "inverse_sqrt": schedulers.InverseSqrt,
        "warmup_stable_decay": schedulers.WarmupStableDecay,
        "piecewise_constant": schedulers.PiecewiseConstant,
        "rex": schedulers.Rex,
        "adafactor": schedulers.AdafactorRates,
    }


@hookimpl
def register_timesteps() -> dict[str, type[Timesteps]]:
    """Give the timestep distributions."""
    return {
        "uniform": timesteps.Uniform,
        "logit-normal": timesteps.LogitNormal,
        "cosine": timesteps.Cosine,
        "sigmoid": timesteps.Sigmoid,
        "table": timesteps.Table,
    }


@hookimpl
def register_noises() -> dict[str, type[Noise]]:
    """Give the noise transforms in the order in which they apply."""
    return {
        "immiscible": noises.Immiscible,
        "noise-offset": noises.NoiseOffset,
        "multires": noises.Multires,
        "input-perturbation": noises.InputPerturbation,
    }


@hookimpl
def register_losses() -> dict[str, type[Loss]]:
    """Give the losses."""
    return {
        "l2": losses.L2,
        "l1": losses.L1,
        "huber": losses.Huber,
        "smooth_l1": losses.SmoothL1,
        "log-cosh": losses.LogCosh,
    }


@hookimpl
def register_weightings() -> dict[str, type[Weighting]]:
    """Give the timestep weightings."""
    return {
        "min-snr": weightings.MinSnr,
        "scale-v-pred": weightings.ScaleVelocityLikeNoise,
        "v-pred-like": weightings.VelocityLikeLoss,
        "debiased-estimation": weightings.DebiasedEstimation,
        "p2": weightings.P2,
    }


@hookimpl
def register_observers() -> dict[str, type[Observer]]:
    """Give the observers."""
    return {
        "progress": Progress,
        "samples": SampleImages,
        "trackers": Trackers,
        "ema": Ema,
        "report": Report,
        "hub": HubUpload,
    }


@hookimpl
def register_commands() -> dict[str, type[Command]]:
    """Give the subcommands."""
    return {
        "bench": Bench,
        "compare": Compare,
        "demo": Demo,
        "inspect": Inspect,
        "merge": Merge,
        "convert": Convert,
        "resize": Resize,
        "extract": Extract,
        "new-plugin": NewPlugin,
    }
