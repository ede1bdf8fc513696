"""Optimizers and schedules of other libraries, by the dotted path of their class.

A component that declares a path and no options has those of the constructor's signature. They are
known once the library is imported, which is when a run names the component.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from pydantic import Field, create_model

from sdxl_train.components import KINDS, Component, Kind, Optimizer, Scheduler
from sdxl_train.errors import PluginError, Problem, UserError
from sdxl_train.packing import pack
from sdxl_train.signatures import arguments_of, fields_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch.optim import Optimizer as TorchOptimizer
    from torch.optim.lr_scheduler import LRScheduler

    from sdxl_train.config import RunConfig
    from sdxl_train.protocols import StepPlan


class OfLibrary(Component):
    """What stands in another library: base of the two kinds below."""

    path: ClassVar[str]
    """Dotted path of the class: ``torch.optim.AdamW``."""
    distribution: ClassVar[str] = ""
    """What pip installs it from, if that is not the package's own name."""
    has_signature: ClassVar[bool] = False
    """The options are those of the constructor's signature."""
    handed: ClassVar[frozenset[str]]
    """Arguments that the run hands over, so that they are no options."""
    filled: ClassVar[frozenset[str]] = frozenset()
    """Arguments that the run hands over unless they are given."""

    @classmethod
    def of(cls, path: str) -> type[Self]:
        """Make the component of what a dotted path names; imports nothing yet."""
        return cast("type[Self]", _component_of(cls, path))

    @classmethod
    def resolved(cls) -> type[Self]:
        """Give the component with all its options.

        Raises:
            PluginError: If the library is not installed, or holds nothing of use by that name.
        """
        _require_package(cls.path, cls.distribution)
        if cls.has_signature or cls.model_fields.keys() != cls._kind().base.model_fields.keys():
            return cls
        target = cls.library_class()
        try:
            cls._require_fit(target)
            taken = {name for name in dir(cls) if name not in cls.model_fields}
            fields = fields_of(target, without=cls.handed | taken, filled=cls.filled)
        except TypeError as error:
            raise PluginError(f"{cls.path} cannot be used: {error}") from None
        namespace = {"__module__": cls.__module__, "__doc__": cls.__doc__, "has_signature": True}
        base: Any = type(cls.__name__, (cls,), {**namespace, **cls._traits(target)})
        made = cast("Any", create_model)(
            cls.__name__, __base__=base, __module__=cls.__module__, __doc__=cls.__doc__, **fields
        )
        return cast("type[Self]", made)

    @classmethod
    def library_class(cls) -> Any:
        """Import the class, or function, that builds it.

        Raises:
            PluginError: If it is not there.
        """
        module_name, _, name = cls.path.rpartition(".")
        try:
            return getattr(importlib.import_module(module_name), name)
        except (Exception, SystemExit) as error:
            # A library may fail in any way; whoever named it must learn which one and why.
            raise PluginError(
                f"{cls.path} cannot be imported: {type(error).__name__}: {error}"
            ) from error

    @classmethod
    def _kind(cls) -> Kind:
        return next(kind for kind in KINDS if issubclass(cls, kind.base))

    @classmethod
    def _require_fit(cls, target: Any) -> None:
        """Raise TypeError with the reason if a run cannot drive what ``target`` builds."""
        raise NotImplementedError

    @classmethod
    def _traits(cls, target: Any) -> dict[str, Any]:
        """Give the class attributes that follow from what the library's class can do."""
        return {}

    def _built(self, over: object, handed: Mapping[str, Any]) -> Any:
        """Call the constructor with the component's own options and what the run hands over.

        Raises:
            UserError: If it refuses them.
        """
        shared = self._kind().base.model_fields
        # What is not given, the library knows: so do options that are None by default.
        own = {name: getattr(self, name) for name in type(self).model_fields if name not in shared}
        options = {
            name: value
            for name, value in own.items()
            if name in self.model_fields_set or not (self.has_signature or value is None)
        }
        target = self.library_class()
        try:
            return target(over, **handed, **options)
        except Exception as error:
            shown = ", ".join(f"{name}={value}" for name, value in {**handed, **options}.items())
            raise UserError.of(
                f"--{self._kind().args}",
                f"{self.path} refuses {shown or 'its defaults'}: {type(error).__name__}: {error}",
            ) from error


@cache
def _component_of(kind: type[OfLibrary], path: str) -> type[OfLibrary]:
    """Make a component once: a plugin may have a hundred, and is asked for them in each run."""
    namespace = {"path": path, "__module__": __name__, "__doc__": f"{path}."}
    return type(path.rpartition(".")[2], (kind,), namespace)


_UNRECTIFIED = 10
"""More than the 5 steps that it takes at usual betas."""


class LibraryOptimizer(OfLibrary, Optimizer):
    """An optimizer of another library, over torch's parameter groups.

    Subclasses declare a path. Options that they declare must have the names of the constructor's
    arguments; without any, the signature tells.
    """

    handed: ClassVar[frozenset[str]] = frozenset({"params", "lr"})

    def build(self, groups: Sequence[dict[str, Any]]) -> TorchOptimizer:
        """Build the library's optimizer."""
        takes_rate = "lr" in arguments_of(self.library_class())
        built: TorchOptimizer = self._built(
            groups, {"lr": self.learning_rate} if takes_rate else {}
        )
        return built

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Let it refuse what a signature does not tell: build it and step, on one parameter."""
        if not self.has_signature:
            return
        try:
            self._try_a_step()
        except UserError as error:
            yield from error.problems

    def _try_a_step(self) -> None:
        """Take a step.

        Raises:
            UserError: If it cannot be built, cannot step, or has a state that no file can hold.
        """
        from torch import nn, ones

        parameter = nn.Parameter(ones(4, 4))
        optimizer: Any = self.build(
            [{"params": [parameter], "lr": self.learning_rate, "name": "trial"}]
        )
        parameter.grad = ones(4, 4)
        try:
            if self.train_eval_modes:
                optimizer.train()
            optimizer.step()
            pack(optimizer.state_dict(), {}, "its state")
        except Exception as error:
            raise UserError.of(
                "--optimizer_type",
                f"{self.path} fails in a step as a run takes it: {type(error).__name__}: {error}",
                "use another optimizer",
            ) from error

    def silent_steps(self) -> int:
        """Give the steps before the variance of rectified Adam is known (Liu et al. 2020)."""
        return _UNRECTIFIED if getattr(self, "silent_sgd_phase", False) else 0

    @classmethod
    def _require_fit(cls, target: Any) -> None:
        from torch.optim import Optimizer as TorchOptimizer

        if not (isinstance(target, type) and issubclass(target, TorchOptimizer)):
            raise TypeError("it is no subclass of torch.optim.Optimizer")
        first = next(iter(arguments_of(target)), "")
        if first != "params":
            raise TypeError(f"it is made of '{first}', not of 'params'")
        _require_plain_step(target)

    @classmethod
    def _traits(cls, target: Any) -> dict[str, Any]:
        swaps_weights = all(callable(getattr(target, mode, None)) for mode in ("train", "eval"))
        traits: dict[str, Any] = {}
        if swaps_weights:
            traits |= {"train_eval_modes": True, "own_schedule": True}
        if "d0" in arguments_of(target):
            # D-Adaptation, Prodigy and their kin estimate the rate from a first guess d0.
            rate = Field(1.0, ge=0, description="Factor of the estimated rate, usually 1.")
            traits |= {
                "single_lr": True,
                "learning_rate": rate,
                "__annotations__": {"learning_rate": float},
            }
        return traits


_TOTAL = frozenset({"total_steps", "num_training_steps", "max_steps", "T_max"})
_WARMUP = frozenset({"num_warmup_steps", "warmup_steps", "warmup_iters", "n_warmup_steps"})
"""What libraries call the steps of a run, and those of its warm-up."""


class LibraryScheduler(OfLibrary, Scheduler):
    """A schedule of another library: a class, or a function of an optimizer that returns one.

    Total and warm-up steps are handed to arguments of the usual names, unless they are given.
    """

    handed: ClassVar[frozenset[str]] = frozenset({"optimizer", "last_epoch", "verbose"})
    filled: ClassVar[frozenset[str]] = _TOTAL | _WARMUP

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Refuse a warm-up that the schedule does not take, or that is given twice."""
        if not self.lr_warmup_steps:
            return
        own = _WARMUP & arguments_of(self.library_class()).keys()
        given = own & self.model_fields_set
        if not own:
            yield Problem(
                place=config.place("lr_warmup_steps"),
                message=f"{self.path} has no argument for a warm-up",
                remedy="leave it out, or use a schedule of `sdxl-train components scheduler`",
            )
        if given:
            yield Problem(
                place=f"{config.place('lr_warmup_steps')}, --lr_scheduler_args {min(given)}",
                message="both say how long the warm-up is",
                remedy="leave one of them out",
            )

    def build(self, optimizer: TorchOptimizer, steps: StepPlan) -> LRScheduler:
        """Build the library's schedule."""
        free = arguments_of(self.library_class()).keys() - self.model_fields_set
        handed = dict.fromkeys(_WARMUP & free, steps.warmup)
        # torch's OneCycleLR may be given its length in epochs.
        if "epochs" not in self.model_fields_set:
            handed |= dict.fromkeys(_TOTAL & free, steps.total)
        built: LRScheduler = self._built(optimizer, handed)
        return built

    @classmethod
    def _require_fit(cls, target: Any) -> None:
        from torch.optim.lr_scheduler import LRScheduler

        if isinstance(target, type) and not issubclass(target, LRScheduler):
            raise TypeError("it is no subclass of torch.optim.lr_scheduler.LRScheduler")
        if next(iter(arguments_of(target)), "") != "optimizer":
            raise TypeError("its first argument is not 'optimizer'")
        if isinstance(target, type):
            _require_plain_step(target)


def _require_plain_step(target: type[Any]) -> None:
    """Raise TypeError if ``step()`` cannot be called without arguments."""
    for name, parameter in arguments_of(target.step).items():
        if parameter.default is parameter.empty and name != "self":
            raise TypeError(f"its step needs '{name}', which a run does not give")


def _require_package(path: str, distribution: str) -> None:
    """Make sure that the package of a dotted path is installed; imports nothing.

    Raises:
        PluginError: If it is not, with the command that installs it.
    """
    package = path.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise PluginError(
            f"{path} needs the package '{package}', which is not installed: "
            f"pip install {distribution or package.replace('_', '-')}"
        )


LIBRARY_KINDS: dict[str, type[LibraryOptimizer] | type[LibraryScheduler]] = {
    "optimizer": LibraryOptimizer,
    "scheduler": LibraryScheduler,
}
"""The kinds of which a dotted path may name any library's class."""
