"""What every contract checks: a component's options, and that it leaves the process alone."""

from __future__ import annotations

import inspect
import os
import random
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from sdxl_train.components import KINDS, Component
from sdxl_train.errors import UserError
from sdxl_train.loading import component_fault
from sdxl_train.options import Setting, options_of, validate
from sdxl_train.plugins import PluginHost
from sdxl_train.registry import Registry
from sdxl_train.resolve import Resolver
from sdxl_train.settings import from_mapping

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sdxl_train.components import Kind
    from sdxl_train.config import RunConfig
    from sdxl_train.errors import Problem

ComponentT = TypeVar("ComponentT", bound=Component)


class Contract(Generic[ComponentT]):
    """The promises of a component. Subclass the contract of your component's kind.

    ``class TestMine(NoiseContract): component = Mine; options = {"strength": 0.1}`` runs all of
    its checks with these options.
    """

    component: type[ComponentT]
    """The class under test."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Options that make it act, by name."""

    def make(self, **changes: Any) -> ComponentT:
        """Make the component with its options and these changes."""
        return self.component(**{**self.options, **changes})

    def test_host_accepts_the_class(self) -> None:
        """It is a subclass of its kind, complete, and its options can be read."""
        assert self._kind() is not None, f"{self.component.__name__} is of no kind"
        assert component_fault(self.component) == ""

    def test_class_and_options_are_documented(self) -> None:
        """Help has a line for the component and one for each of its options."""
        assert inspect.cleandoc(self.component.__doc__ or ""), "the class has no docstring"
        silent = [option.flag for option in options_of(self.component).values() if not option.help]
        assert not silent, f"these options have no description: {', '.join(silent)}"

    def test_options_survive_the_record(self) -> None:
        """What a run writes down of the options gives the same component when read again."""
        made = self.make()
        recorded = made.model_dump(mode="json", exclude_none=True)
        settings = {
            name: Setting(value=value, place=name, origin="record")
            for name, value in recorded.items()
        }
        problems: list[Problem] = []
        again = validate(self.component, settings, problems)
        assert not problems, f"the recorded options {recorded} are refused: {problems}"
        assert again == made, f"the recorded options {recorded} give {again!r}, not {made!r}"

    def test_unknown_option_is_refused(self) -> None:
        """A misspelt option never passes unnoticed."""
        with pytest.raises(ValidationError):
            self.make(no_option_has_this_name=1)

    def test_options_are_frozen(self) -> None:
        """Options stay as the run checked and recorded them."""
        made = self.make()
        for name in type(made).model_fields:
            with pytest.raises(ValidationError):
                setattr(made, name, getattr(made, name))

    def _kind(self) -> Kind | None:
        return next((kind for kind in KINDS if issubclass(self.component, kind.base)), None)

    def refusals(self, **changes: Any) -> list[str]:
        """Say why a run would refuse the component with these options; empty if it would not."""
        try:
            made = self.make(**changes)
        except ValidationError as error:
            return [str(error)]
        return [str(problem) for problem in made.check(self.run_config(made))]

    def run_config(self, component: Component) -> RunConfig:
        """Make the configuration of a run that uses ``component``, and defaults otherwise."""
        host = PluginHost()
        settings = from_mapping({"pretrained_model_name_or_path": "model", "output_dir": "output"})
        config = Resolver(settings, host, Registry(host)).resolve().config
        assert config is not None, "no model family is installed"
        kind = self._kind()
        assert kind is not None
        chosen: Any = {f"{kind.name}s": (component,)} if kind.stacked else {kind.name: component}
        return replace(config, **chosen)


@contextmanager
def untouched_process(*, draws: bool = False) -> Iterator[None]:
    """Fail if the code inside changes what all of the process shares.

    Args:
        draws: Whether it may draw from the global random generators.
    """
    before = _shared_state()
    yield
    after = _shared_state()
    may_change = _RANDOM if draws else ()
    changed = [
        name for name in before if before[name] != after[name] and not name.startswith(may_change)
    ]
    assert not changed, f"it changes what others rely on: {', '.join(changed)}"


_RANDOM = ("random",)


def _shared_state() -> dict[str, object]:
    numpy: Any = np.random.get_state(legacy=False)
    return {
        "random state of torch": torch.get_rng_state().numpy().tobytes(),
        "random state of CUDA": [
            state.numpy().tobytes() for state in torch.cuda.get_rng_state_all()
        ]
        if torch.cuda.is_available()
        else [],
        "random state of numpy": (numpy["state"]["key"].tobytes(), numpy["state"]["pos"]),
        "random state of Python": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "number of threads": torch.get_num_threads(),
        "gradient mode": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "precision of matrix products": torch.get_float32_matmul_precision(),
        "working directory": os.getcwd(),  # noqa: PTH109 - the text, not a path
        "environment variables": dict(os.environ),
    }


def is_refused(build: Any, *arguments: Any) -> bool:
    """Tell whether a build refuses its arguments as a user's mistake."""
    try:
        build(*arguments)
    except UserError:
        return True
    return False
