"""The kit for plugin authors: a contract for each kind of component, and tiny things to train.

``pytest -p sdxl_train.testing`` brings the fixtures. A contract is used in three lines::

    class TestMine(NoiseContract):
        component = Mine
        options = {"strength": 0.1}

The contracts load when first used, so that a pytest session that only needs the fixtures does not
import torch for them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sdxl_train.testing.fixtures import (
    TinyModel,
    TinyRun,
    TrainTiny,
    WritePlugin,
    plugin_files,
    tiny_dataset,
    tiny_model,
    train_tiny,
)

if TYPE_CHECKING:
    from sdxl_train.testing.command import CommandContract
    from sdxl_train.testing.loss import LossContract
    from sdxl_train.testing.model import ModelContract
    from sdxl_train.testing.network import NetworkContract
    from sdxl_train.testing.noise import NoiseContract
    from sdxl_train.testing.observer import ObserverContract
    from sdxl_train.testing.optimizer import OptimizerContract
    from sdxl_train.testing.quantization import QuantizationContract
    from sdxl_train.testing.scheduler import SchedulerContract
    from sdxl_train.testing.timesteps import TimestepsContract
    from sdxl_train.testing.weighting import WeightingContract

__all__ = [
    "CommandContract",
    "LossContract",
    "ModelContract",
    "NetworkContract",
    "NoiseContract",
    "ObserverContract",
    "OptimizerContract",
    "QuantizationContract",
    "SchedulerContract",
    "TimestepsContract",
    "TinyModel",
    "TinyRun",
    "TrainTiny",
    "WeightingContract",
    "WritePlugin",
    "plugin_files",
    "tiny_dataset",
    "tiny_model",
    "train_tiny",
]

_CONTRACT = "Contract"


def __getattr__(name: str) -> Any:
    if name not in __all__ or not name.endswith(_CONTRACT):
        raise AttributeError(f"module 'sdxl_train.testing' has no attribute {name!r}")
    module = f"sdxl_train.testing.{name.removesuffix(_CONTRACT).lower()}"
    return getattr(importlib.import_module(module), name)
