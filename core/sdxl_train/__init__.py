"""sdxl-train: a trainer for LoRA-family networks in which every component is a plugin.

The names in ``__all__`` are the public API. They load when first used, so that importing this
package, or asking for help, does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sdxl_train._version import __version__

if TYPE_CHECKING:
    from pydantic import Field

    from sdxl_train.api import plan, train
    from sdxl_train.by_name import named_values, read_values
    from sdxl_train.checkpoint import Checkpoint, write_atomically
    from sdxl_train.components import (
        Command,
        Component,
        DecayRate,
        LimitedNetwork,
        Loss,
        Model,
        Network,
        Noise,
        Observer,
        Optimizer,
        Quantization,
        Scheduler,
        StepsOrShare,
        Timesteps,
        TrainingCommand,
        Weighting,
    )
    from sdxl_train.config import RunConfig
    from sdxl_train.counts import StepCounts
    from sdxl_train.document import peak_memory
    from sdxl_train.errors import Problem, SdxlTrainError, TrainingError, UserError
    from sdxl_train.finite import is_finite
    from sdxl_train.history import History, StepNumbers
    from sdxl_train.hookspecs import hookimpl
    from sdxl_train.libraries import quiet
    from sdxl_train.library_components import LibraryOptimizer, LibraryScheduler
    from sdxl_train.loop import StepResult
    from sdxl_train.observed import Run, RunResult
    from sdxl_train.pace import Pace
    from sdxl_train.pictures import ImageRequest, ImageSampler, SampledImage
    from sdxl_train.planning import Plan
    from sdxl_train.progress import shows_bars
    from sdxl_train.protocols import (
        Adapter,
        LimitedAdapter,
        LimitedDelta,
        LoadedModel,
        LossFunction,
        MultiplyingFormat,
        NoiseTransform,
        ParameterGroup,
        Part,
        QuantizableModel,
        StepPlan,
        TimestepSampler,
        WeightAverage,
        WeightFormat,
        WeightFunction,
    )
    from sdxl_train.recorded import recorded_settings
    from sdxl_train.rng import derive_seed
    from sdxl_train.schedule import NoiseSchedule, PredictionType
    from sdxl_train.tensor_file import TENSOR_DTYPES, TensorEntry, hashes_of, write_tensors
    from sdxl_train.toml_files import read_text, read_toml
    from sdxl_train.validation import ValidationResult
    from sdxl_train.weights import limit_norms, require_fit

_HOMES = {
    "Field": "pydantic",
    "plan": "sdxl_train.api",
    "train": "sdxl_train.api",
    "RunConfig": "sdxl_train.config",
    "StepCounts": "sdxl_train.counts",
    "History": "sdxl_train.history",
    "StepNumbers": "sdxl_train.history",
    "hookimpl": "sdxl_train.hookspecs",
    "LibraryOptimizer": "sdxl_train.library_components",
    "LibraryScheduler": "sdxl_train.library_components",
    "StepResult": "sdxl_train.loop",
    "Checkpoint": "sdxl_train.checkpoint",
    "Pace": "sdxl_train.pace",
    "peak_memory": "sdxl_train.document",
    "shows_bars": "sdxl_train.progress",
    "write_atomically": "sdxl_train.checkpoint",
    "ImageRequest": "sdxl_train.pictures",
    "ImageSampler": "sdxl_train.pictures",
    "SampledImage": "sdxl_train.pictures",
    "derive_seed": "sdxl_train.rng",
    "Plan": "sdxl_train.planning",
    "Run": "sdxl_train.observed",
    "RunResult": "sdxl_train.observed",
    **dict.fromkeys(
        (
            "Adapter",
            "LimitedAdapter",
            "LimitedDelta",
            "LoadedModel",
            "LossFunction",
            "MultiplyingFormat",
            "NoiseTransform",
            "ParameterGroup",
            "Part",
            "QuantizableModel",
            "StepPlan",
            "TimestepSampler",
            "WeightAverage",
            "WeightFormat",
            "WeightFunction",
        ),
        "sdxl_train.protocols",
    ),
    "NoiseSchedule": "sdxl_train.schedule",
    "PredictionType": "sdxl_train.schedule",
    "TENSOR_DTYPES": "sdxl_train.tensor_file",
    "TensorEntry": "sdxl_train.tensor_file",
    "recorded_settings": "sdxl_train.recorded",
    "is_finite": "sdxl_train.finite",
    "hashes_of": "sdxl_train.tensor_file",
    "write_tensors": "sdxl_train.tensor_file",
    "Problem": "sdxl_train.errors",
    "SdxlTrainError": "sdxl_train.errors",
    "TrainingError": "sdxl_train.errors",
    "UserError": "sdxl_train.errors",
    "limit_norms": "sdxl_train.weights",
    "named_values": "sdxl_train.by_name",
    "read_values": "sdxl_train.by_name",
    "quiet": "sdxl_train.libraries",
    "ValidationResult": "sdxl_train.validation",
    "require_fit": "sdxl_train.weights",
    "read_text": "sdxl_train.toml_files",
    "read_toml": "sdxl_train.toml_files",
}

__all__ = [
    "TENSOR_DTYPES",
    "Adapter",
    "Checkpoint",
    "Command",
    "Component",
    "DecayRate",
    "Field",
    "History",
    "ImageRequest",
    "ImageSampler",
    "LibraryOptimizer",
    "LibraryScheduler",
    "LimitedAdapter",
    "LimitedDelta",
    "LimitedNetwork",
    "LoadedModel",
    "Loss",
    "LossFunction",
    "Model",
    "MultiplyingFormat",
    "Network",
    "Noise",
    "NoiseSchedule",
    "NoiseTransform",
    "Observer",
    "Optimizer",
    "Pace",
    "ParameterGroup",
    "Part",
    "Plan",
    "PredictionType",
    "Problem",
    "QuantizableModel",
    "Quantization",
    "Run",
    "RunConfig",
    "RunResult",
    "SampledImage",
    "Scheduler",
    "SdxlTrainError",
    "StepCounts",
    "StepNumbers",
    "StepPlan",
    "StepResult",
    "StepsOrShare",
    "TensorEntry",
    "TimestepSampler",
    "Timesteps",
    "TrainingCommand",
    "TrainingError",
    "UserError",
    "ValidationResult",
    "WeightAverage",
    "WeightFormat",
    "WeightFunction",
    "Weighting",
    "__version__",
    "derive_seed",
    "hashes_of",
    "hookimpl",
    "is_finite",
    "limit_norms",
    "named_values",
    "peak_memory",
    "plan",
    "quiet",
    "read_text",
    "read_toml",
    "read_values",
    "recorded_settings",
    "require_fit",
    "shows_bars",
    "train",
    "write_atomically",
    "write_tensors",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sdxl_train' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "sdxl_train.components")), name)


def __dir__() -> list[str]:
    return __all__
