"""The kinds of component: what a plugin may provide, and what each one builds.

A component is a frozen pydantic model of its options with one method, ``build``. The fields are
the flags, the TOML keys, the help, the checks and the record in the saved file. ``build`` turns the
options into what the training loop calls: a plain callable or one of :mod:`.protocols`.

Nothing here imports torch, so that asking for help stays fast; neither should the module of a
built-in component. Import torch inside ``build``.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 - pydantic needs it
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    Self,
    TypeAlias,
)

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr

from sdxl_train.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import device, dtype
    from torch.optim import Optimizer as TorchOptimizer
    from torch.optim.lr_scheduler import LRScheduler

    from sdxl_train.config import RunConfig
    from sdxl_train.counts import StepCounts
    from sdxl_train.observed import Run
    from sdxl_train.protocols import (
        Adapter,
        LoadedModel,
        LossFunction,
        NoiseTransform,
        StepPlan,
        TimestepSampler,
        WeightFormat,
        WeightFunction,
    )
    from sdxl_train.schedule import NoiseSchedule, PredictionType


class OptionModel(BaseModel):
    """Options that belong together: frozen, and nothing undeclared is accepted."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        # Most models of a process are never built; compiling them all would slow down --help.
        defer_build=True,
    )


class Component(OptionModel):
    """A named, exchangeable piece of training. Subclass one of the kinds, not this class."""

    default: ClassVar[bool] = False
    """Whether this component serves when the run names none of its kind (built-in ones only)."""
    may_change: ClassVar[frozenset[str]] = frozenset()
    """Options that a resumed run may set otherwise: they say where something lies, not what is
    trained."""

    chosen_by: ClassVar[frozenset[str]] = frozenset()
    """Switches of its own that choose it where the run names none of its kind."""

    @classmethod
    def resolved(cls) -> type[Self]:
        """Give the class that serves when a run names this one, with all its options.

        Another one only where the options are known no sooner than a library is imported.

        Raises:
            PluginError: If that library is not there.
        """
        return cls

    def active(self) -> bool:
        """Tell whether the options ask for anything.

        Only asked of stacked kinds. A component whose option has a value that means "off" (the
        ecosystem writes ``min_snr_gamma = 0``) answers False then and is not built.
        """
        return True

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Yield what is wrong with these options in this run, before any weights are read.

        May read headers of files. Must not import torch.
        """
        yield from ()

    def remarks(self, config: RunConfig) -> Iterator[str]:
        """Yield what these options do, or do not do, that their user may not expect.

        Shown as warnings before the run. Must not import torch.
        """
        yield from ()

    def machine_problems(self, config: RunConfig) -> Iterator[Problem]:
        """Yield what these options ask for that this machine does not have.

        A plan tells of it, a run is refused. May import torch where the options ask for something;
        ``config.device()`` is where the run would compute.
        """
        yield from ()

    def contents(self) -> Mapping[str, str]:
        """Give what a resumed run compares of options that name a file: its content, not its place.

        Returns:
            By the option's name, a short text that is another one for another content.
        """
        return {}


# ---------------------------------------------------------------------------------------- kinds


class Model(Component):
    """A family of base models."""

    may_change: ClassVar[frozenset[str]] = frozenset({"pretrained_model_name_or_path"})
    bucket_multiple: ClassVar[int] = 8
    """Sides of training images must be a multiple of this many pixels."""
    resolution: ClassVar[int | None] = None
    """Side of the training size where the user gives none; None: it must be given."""

    pretrained_model_name_or_path: str = Field(
        description="Base model: a single .safetensors file, a diffusers folder, or a hub id.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Recompute activations in the backward pass: less memory, a third slower.",
    )

    @property
    def reuses_memory(self) -> bool:
        """Whether CUDA graphs are replayed, each over what the prediction before it computed."""
        return False

    def block_names(self) -> Sequence[str]:
        """Name the denoiser's blocks for which users give values one by one, in their order."""
        return ()

    def predicts(self) -> PredictionType | None:
        """Give what the denoiser predicts; None if that cannot be told before it is loaded."""
        return None

    @abstractmethod
    def build(self, device: device | str, dtype: dtype) -> LoadedModel:
        """Load the model with its frozen weights in ``dtype`` on ``device``.

        ``device="meta"`` reads no weights: the shapes are enough to plan a run.
        """

    @classmethod
    def write_tiny(cls, path: Path, *, seed: int = 0) -> Path:
        """Write a small random model of this family to a new ``path``, and give the path.

        It has the topology and the names of the real ones, so that tests of plugins can train on
        it in seconds.

        Raises:
            NotImplementedError: If the family offers none.
        """
        raise NotImplementedError(f"{cls.__name__} offers no tiny model")


class Quantization(Component):
    """How the frozen weights of the base model are stored, and multiplied."""

    fp8_base: bool = Field(False, description="Short for --base_quantization fp8.")
    fp8_base_unet: bool = Field(
        False, description="The same, with --quantize_denoiser_only; for sd-scripts' users."
    )
    quantize_denoiser_only: bool = Field(
        False, description="Leave the text encoders in the precision of the run."
    )

    @property
    def denoiser_only(self) -> bool:
        """Whether the text encoders stay as they are."""
        return self.quantize_denoiser_only or (self.fp8_base_unet and not self.fp8_base)

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Refuse a short form beside another choice."""
        for name in ("fp8_base", "fp8_base_unet"):
            if getattr(self, name) and name not in self.chosen_by:
                yield Problem(
                    place=config.place(name),
                    message=f"contradicts {config.place('base_quantization')} "
                    f"{config.name_of('quantization')}: both say how the base model is stored",
                    remedy="leave one of them out",
                )

    def remarks(self, config: RunConfig) -> Iterator[str]:
        """Say where one short form includes the other."""
        if self.fp8_base and self.fp8_base_unet:
            yield (
                f"{config.place('fp8_base_unet')} has no effect: {config.place('fp8_base')} "
                f"includes the text encoders"
            )

    @abstractmethod
    def build(self) -> WeightFormat | None:
        """Build the format; None where weights stay as they are."""


class Network(Component):
    """A network that adapts a base model: LoRA and its relatives."""

    # A state holds the weights, and knows by hash what was merged.
    may_change: ClassVar[frozenset[str]] = frozenset({"network_weights", "base_weights"})

    network_dim: int | None = Field(
        None, ge=1, description="Rank. Each network states its own default (LoRA: 4)."
    )
    network_alpha: float = Field(
        1.0, ge=0, description="Scale: the delta is multiplied by alpha/rank. 0 means the rank."
    )
    network_dropout: float | None = Field(
        None, ge=0, lt=1, description="Probability of dropping a rank activation while training."
    )

    network_weights: Path | None = Field(
        None,
        description="Begin with the weights of this file, instead of a network that does nothing.",
    )
    base_weights: list[Path] | None = Field(
        None,
        description="Networks to merge into the frozen base model before training, in any naming.",
    )
    base_weights_multiplier: list[float] | None = Field(
        None, description="How much of each of base_weights is merged; missing ones are 1."
    )

    def merged(self) -> list[tuple[Path, float]]:
        """Give the networks to merge into the base model, each with its multiplier."""
        files, multipliers = self.base_weights or [], self.base_weights_multiplier or []
        return [
            (path, multipliers[i] if i < len(multipliers) else 1.0) for i, path in enumerate(files)
        ]

    @abstractmethod
    def build(self, model: LoadedModel) -> Adapter:
        """Attach a new network to ``model.parts``. It must work on the meta device too."""


class LimitedNetwork(Network):
    """A network whose deltas can be kept below a norm; it builds a :class:`LimitedAdapter`."""

    scale_weight_norms: float | None = Field(
        None,
        gt=0,
        json_schema_extra={"flag": True},
        description="After each step, shrink the delta of a layer to this norm where it is larger.",
    )


DecayRate: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
"""The share of a running mean that each step keeps: the betas of Adam and its kin."""


class Optimizer(Component):
    """An optimizer.

    The traits below are declared by a subclass and honoured by the run.
    """

    single_lr: ClassVar[bool] = False
    """All groups must have the same rate (Prodigy, D-Adaptation)."""
    train_eval_modes: ClassVar[bool] = False
    """Has ``train()`` and ``eval()`` that must bracket saves and samples (schedule-free)."""
    own_schedule: ClassVar[bool] = False
    """Schedules its rate itself: only the scheduler ``constant`` goes with it."""
    fused_backward: ClassVar[bool] = False
    """Can step parameter by parameter inside the backward pass."""
    elementwise: ClassVar[bool] = False
    """Steps each number by its own gradient and state alone: parts of flattened parameters can be
    stepped apart (DeepSpeed's ZeRO)."""

    learning_rate: float = Field(
        2e-6, ge=0, description="Rate of every group that has none of its own. LoRA: about 1e-4."
    )

    @abstractmethod
    def build(self, groups: Sequence[dict[str, Any]]) -> TorchOptimizer:
        """Build over torch parameter groups: dicts with ``params``, ``lr`` and ``name``."""

    def silent_steps(self) -> int:
        """Give the first steps in which it may leave all weights as they are, by design."""
        return 0

    def brings_schedule(self) -> str | None:
        """Name the schedule of an optimizer that pays no heed to the rates of its groups.

        None where they and the run's schedule act.
        """
        return None

    def build_schedule(self, optimizer: TorchOptimizer) -> LRScheduler:
        """Build what :meth:`brings_schedule` names, in place of the run's schedule."""
        raise NotImplementedError


def _steps_or_share(value: object) -> object:
    """Read ``10%`` as 0.1; leave counts and shares alone, as sd-scripts writes it."""
    if isinstance(value, str) and value.endswith("%"):
        return float(value[:-1]) / 100
    return value


StepsOrShare: TypeAlias = Annotated[
    Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)],
    BeforeValidator(
        _steps_or_share,
        json_schema_input_type=Annotated[int, Field(ge=0)]
        | Annotated[float, Field(ge=0, lt=1)]
        | Annotated[str, Field(pattern=r"^[0-9.]+%$")],
    ),
]
"""A number of optimizer steps, or a share of all steps: ``100``, ``0.1``, ``10%``."""


class Scheduler(Component):
    """A learning-rate schedule, counted in optimizer steps."""

    lr_warmup_steps: StepsOrShare = Field(
        0, description="Warm-up: optimizer steps, a share below 1, or a percentage (10%)."
    )

    def decay(self) -> StepsOrShare:
        """Give the steps in which the rate falls at the end; 0 where there is no such phase."""
        return 0

    @abstractmethod
    def build(self, optimizer: TorchOptimizer, steps: StepPlan) -> LRScheduler:
        """Build the schedule; the run calls its ``step()`` after each optimizer step."""


class Timesteps(Component):
    """A distribution of training timesteps."""

    min_timestep: int = Field(0, ge=0, description="Lowest timestep that is trained.")
    max_timestep: int | None = Field(
        None, ge=1, description="Timesteps are trained below this one. Default: all."
    )

    @abstractmethod
    def build(self, schedule: NoiseSchedule) -> TimestepSampler:
        """Build ``(n, generator) -> int64 [n]``; the generator lives on the CPU."""


class Noise(Component):
    """A transform of the noise. Several can be active; they apply in order of registration."""

    phase: ClassVar[Literal["target", "input"]] = "target"
    """``target``: added to the latents and to be predicted. ``input``: added only."""

    @abstractmethod
    def build(self, schedule: NoiseSchedule) -> NoiseTransform:
        """Build ``(noise, latents, timesteps, generator) -> noise``, tensors [B, C, h, w]."""


class Loss(Component):
    """The distance between prediction and target."""

    @abstractmethod
    def build(self, schedule: NoiseSchedule) -> LossFunction:
        """Build ``(prediction, target, timesteps) -> loss``, by element: [B, C, h, w], fp32."""


class Weighting(Component):
    """A weight for each sample by its timestep. Several can be active; they multiply."""

    @abstractmethod
    def build(self, schedule: NoiseSchedule) -> WeightFunction:
        """Build ``timesteps [B] -> weights [B]``, fp32, finite and not negative."""


class Observer(Component):
    """Something that watches a run: progress, trackers, samples. It cannot change the weights."""

    always: ClassVar[bool] = False
    """Active without being asked for (built-in ones only)."""
    unlimited: ClassVar[bool] = False
    """Its calls may take longer than ``--observer_timeout``: it computes, it waits for nobody."""
    everywhere: ClassVar[bool] = False
    """Built and told in every process, to share its work out (``run.share_out``); other observers
    live in the main process only. It must do the same everywhere but for what it writes."""
    averages: ClassVar[bool] = False
    """What it builds is a :class:`.WeightAverage`, as large as the trained weights in fp32."""

    def sample_steps(self, counts: StepCounts) -> Sequence[int]:
        """Give the steps after which this observer samples pictures, for the plan.

        0 is before the first.
        """
        return ()

    def fetch_state(self, config: RunConfig, files: Sequence[str]) -> Path | None:
        """Bring the state that ``--resume`` names here, where this observer knows how.

        Asked before the start, by the main process only. The state is then checked as one that
        always lay here.

        Args:
            config: The run's options.
            files: Names of the files of the state that are needed now, its manifest first. A plan
                needs no more than that one.

        Returns:
            The folder that holds them; None if the option names no state for this observer.

        Raises:
            UserError: If the state is not there, or cannot be had.
        """
        return None

    @abstractmethod
    def build(self, run: Run) -> object:
        """Build an object whose methods are named after events (see :mod:`.hookspecs`)."""


class Command(Component):
    """A subcommand, ``sdxl-train NAME``. A field in ``positional`` needs no flag."""

    positional: ClassVar[tuple[str, ...]] = ()
    """Names of the fields that may be given by position; a list takes all words that are left."""
    short: ClassVar[Mapping[str, str]] = {}
    """Letters that stand for a field: ``{"o": "save_to"}`` makes ``-o`` another ``--save_to``."""

    @abstractmethod
    def run(self) -> int:
        """Do the work and return the exit code."""


class TrainingCommand(Command):
    """A subcommand that takes the flags of training beside its own."""

    _training: Mapping[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def training(self) -> Mapping[str, Any]:
        """The options of training that were given, by name, as :func:`sdxl_train.train` takes them.

        They are checked there; ``str()`` of a value shows what was typed.
        """
        return self._training

    def with_training(self, options: Mapping[str, Any]) -> Self:
        """Give the command the options of training."""
        self._training = dict(options)
        return self


# ------------------------------------------------------------------------------------- registry


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What the host knows about a kind.

    Attributes:
        name: ``network``; also the word before the name in ``components network:lora``.
        base: The abstract option model.
        hook: The hook that collects its components.
        selector: The option that chooses one; for stacked kinds, the one that adds one by name.
        stacked: Several can be active at once.
        args: The option that takes the component's own fields as ``key=value``, if they are not
            flags themselves.
    """

    name: str
    base: type[Component]
    hook: str
    selector: str
    stacked: bool = False
    args: str | None = None


KINDS: tuple[Kind, ...] = (
    Kind(name="model", base=Model, hook="register_models", selector="model_type"),
    Kind(
        name="quantization",
        base=Quantization,
        hook="register_quantizations",
        selector="base_quantization",
    ),
    Kind(
        name="network",
        base=Network,
        hook="register_networks",
        selector="network_module",
        args="network_args",
    ),
    Kind(
        name="optimizer",
        base=Optimizer,
        hook="register_optimizers",
        selector="optimizer_type",
        args="optimizer_args",
    ),
    Kind(
        name="scheduler",
        base=Scheduler,
        hook="register_schedulers",
        selector="lr_scheduler",
        args="lr_scheduler_args",
    ),
    Kind(
        name="timesteps",
        base=Timesteps,
        hook="register_timesteps",
        selector="timestep_sampling",
    ),
    Kind(name="noise", base=Noise, hook="register_noises", selector="noise", stacked=True),
    Kind(name="loss", base=Loss, hook="register_losses", selector="loss_type"),
    Kind(
        name="weighting",
        base=Weighting,
        hook="register_weightings",
        selector="weighting",
        stacked=True,
    ),
    Kind(
        name="observer",
        base=Observer,
        hook="register_observers",
        selector="observer",
        stacked=True,
    ),
    Kind(name="command", base=Command, hook="register_commands", selector=""),
)
