"""Importing libraries without the parts of them that a training does not use.

diffusers and transformers import what they find installed, for features that most programs never
touch: peft, bitsandbytes, scipy, torch's compiler and its distributed tensors. That takes three
times as long as what a training needs of them. Within :func:`lean_imports` it is put off:

- Of a package to skip, only the modules that are asked for are imported. Its ``__init__``, which
  would import all of them (or, of transformers, read the source of all its models), runs when
  somebody asks for a name that is not there and whose module is not known here.
- The list of all installed distributions is made when it is looked into.
- Of a module to put off, names are given that stand for what it has. Such a name is looked up,
  and the module imported, when it is called or asked for something. (Nothing can be an instance of
  a class whose module was never imported, so ``isinstance`` needs no import either.)

All of it works for whoever uses it later; it is only imported then. Afterwards ``sys.modules`` has
no stand-ins: whoever imports one of these modules gets the real one.

This leans on how the libraries are laid out. Should a version of them not bear it, the environment
variable ``LEAN_IMPORTS=0`` imports them as they are.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import sys
import typing
from collections.abc import Mapping
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, Union

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_SKIPPED: Final[Mapping[str, Mapping[str, str]]] = {
    "diffusers.hooks": {},
    "diffusers.models.autoencoders": {},
    "diffusers.models.transformers": {},
    "diffusers.models.unets": {},
    "transformers": {
        "CLIPTextConfig": "transformers.models.clip.configuration_clip",
        "CLIPTextModel": "transformers.models.clip.modeling_clip",
        "CLIPTextModelWithProjection": "transformers.models.clip.modeling_clip",
        "CLIPTokenizer": "transformers.models.clip.tokenization_clip",
        "PreTrainedModel": "transformers.modeling_utils",
    },
    "transformers.models": {},
}
"""Packages, each with the modules of names that are asked for while others are imported."""

_PUT_OFF: Final = (
    "bitsandbytes",
    "diffusers.loaders.single_file_utils",
    "diffusers.utils.dynamic_modules_utils",
    "peft.helpers",
    "peft.tuners.tuners_utils",
    "requests",
    "scipy.optimize",
    "scipy.stats",
    "torch._dynamo",
    "torch._dynamo._trace_wrapped_higher_order_op",
    "torch.distributed._composable.fsdp",
    "torch.distributed.checkpoint.hf_storage",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.tensor._utils",
    "torch.distributed.tensor.placement_types",
    "transformers.distributed.expert_parallel",
    "transformers.distributed.fsdp",
    "transformers.distributed.tensor_parallel",
    "transformers.generation.continuous_batching",
    "transformers.generation.continuous_batching.cache",
    "transformers.integrations.deepgemm",
    "transformers.integrations.sonicmoe",
    "transformers.processing_utils",
    "transformers.utils.chat_template_utils",
)


@contextmanager
def lean_imports() -> Iterator[None]:
    """Put off what training does not use of the libraries that are imported in here."""
    if os.environ.get("LEAN_IMPORTS") == "0":
        yield
        return
    found = (_find(name) for name in _PUT_OFF if name not in sys.modules)
    put_off = {spec.name: _PutOff(spec) for spec in found if spec is not None}
    finder = _Lean()
    installed = importlib.metadata.packages_distributions
    distributions = _Distributions(installed)
    importlib.metadata.packages_distributions = lambda: distributions
    sys.modules.update(put_off)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = installed
        sys.meta_path.remove(finder)
        finder.document_again()
        for name, module in put_off.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
    _leave_peft_out()


def _not_documented(documented: Any = None, **_: Any) -> Any:
    return _not_documented if documented is None else documented


def _leave_peft_out() -> None:
    """Let a denoiser without a scale for peft's layers predict without importing peft."""
    if (module := sys.modules.get("diffusers.utils.peft_utils")) is None:
        return
    for name in ("scale_lora_layers", "unscale_lora_layers"):
        function = getattr(module, name)
        if not hasattr(function, "__wrapped__"):
            setattr(module, name, _unless_scale_is_one(function))


def _unless_scale_is_one(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def scale(model: Any, weight: float | None = None) -> None:
        if weight is not None and weight != 1.0:
            function(model, weight)

    return scale


@functools.cache
def _find(name: str) -> ModuleSpec | None:
    """Find a module without importing the packages that it is in."""
    parent, _, _ = name.rpartition(".")
    if not parent:
        return PathFinder.find_spec(name)
    package = _find(parent)
    places = package and package.submodule_search_locations
    return PathFinder.find_spec(name, places) if places else None


class _Lean(MetaPathFinder):
    """Finds the packages to skip, and what is in packages that are put off."""

    _DOCUMENTS: Final = "transformers.utils"
    """Has ``auto_docstring``, which imports a hundred modules to put docstrings together."""

    def __init__(self) -> None:
        self._auto_docstring: Callable[..., Any] | None = None

    def document_again(self) -> None:
        """Give back the decorator of classes that are imported from now on."""
        if self._auto_docstring is not None:
            vars(sys.modules[self._DOCUMENTS])["auto_docstring"] = self._auto_docstring

    def _document_nothing(self, module: ModuleType) -> None:
        self._auto_docstring = vars(module)["auto_docstring"]
        vars(module)["auto_docstring"] = _not_documented

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find one of them, as usual but for its loader."""
        parent = fullname.rpartition(".")[0]
        if isinstance(sys.modules.get(parent), _PutOff):
            # One that is imported in earnest needs the package that it is in.
            return PathFinder.find_spec(fullname, _imported(parent).__path__)
        if fullname != self._DOCUMENTS and fullname not in _SKIPPED:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            loader = (
                _SkippingLoader(spec.loader)
                if fullname in _SKIPPED
                else _ThenLoader(spec.loader, self._document_nothing)
            )
            spec.loader = loader  # type: ignore[assignment]
        return spec


class _SkippingLoader:
    """Makes a package whose ``__init__`` another loader runs later."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _SkippedPackage(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        vars(module)[_SkippedPackage.WAITING] = self._loader


class _ThenLoader:
    """Loads a module as another loader does, and then does something to it."""

    def __init__(self, loader: Any, then: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._then = then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._then(module)


class _SkippedPackage(ModuleType):
    """A package whose ``__init__`` runs when it is asked for a name that it has not."""

    WAITING: Final = "_runs_init_when_needed"

    def __getattr__(self, name: str) -> Any:
        if name == "__version__" and "." not in self.__name__:
            return importlib.metadata.version(self.__name__)
        if name.startswith("__") and name != "__all__":
            raise _lacks(self, name)
        if (module := _SKIPPED[self.__name__].get(name)) is not None:
            return getattr(importlib.import_module(module), name)
        if PathFinder.find_spec(f"{self.__name__}.{name}", self.__path__) is not None:
            return importlib.import_module(f"{self.__name__}.{name}")
        if (loader := vars(self).pop(self.WAITING, None)) is not None:
            loader.exec_module(self)
        # The `__init__` may have put another module in the place of this one.
        current = sys.modules[self.__name__]
        if current is not self:
            return getattr(current, name)
        if name not in vars(self):
            raise _lacks(self, name)
        return vars(self)[name]


class _Distributions(Mapping[str, list[str]]):
    """The distributions of each package; the files of all that is installed are read for it."""

    def __init__(self, find: Callable[[], Mapping[str, list[str]]]) -> None:
        self._find = find

    @functools.cached_property
    def _found(self) -> Mapping[str, list[str]]:
        return self._find()

    def __getitem__(self, package: str) -> list[str]:
        return self._found[package]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


class _PutOff(ModuleType):
    """Stands for a module that is not imported yet."""

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__(spec.name)
        # Who wants to know whether a package is installed looks at this.
        self.__spec__ = spec
        if spec.submodule_search_locations is not None:
            self.__path__ = list(spec.submodule_search_locations)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise _lacks(self, name)
        if name in (known := _KNOWN.get(self.__name__, {})):
            return known[name]
        if sys.modules.get(self.__name__) is self:
            return _Later(self.__name__, name)
        return getattr(_imported(self.__name__), name)


class _Later:
    """Stands for a name of a module that is not imported yet."""

    def __init__(self, module: str, name: str) -> None:
        self.__module__, self.__name__, self.__qualname__ = module, name, name

    def __real(self) -> Any:
        return getattr(_imported(self.__module__), self.__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__real()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__real(), name)

    def __instancecheck__(self, instance: object) -> bool:
        return _is_imported(self.__module__) and isinstance(instance, self.__real())

    def __subclasscheck__(self, subclass: type) -> bool:
        return _is_imported(self.__module__) and issubclass(subclass, self.__real())

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.__real(),)

    def __or__(self, other: Any) -> Any:
        return Union[self, other]  # noqa: UP007 - this is what | means

    def __ror__(self, other: Any) -> Any:
        return Union[other, self]  # noqa: UP007


def _not_compiled(
    function: Callable[..., Any] | None = None, recursive: bool = True, **how: Any
) -> Any:
    """Do what ``torch._dynamo.disable`` does, where there is a compiler to keep out."""
    if function is None:
        return functools.partial(_not_compiled, recursive=recursive, **how)
    disabled: list[Any] = []

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            compiler = importlib.import_module("torch._dynamo")
            disabled.append(compiler.disable(function, recursive, **how))
        return disabled[0](*args, **kwargs)

    return called


_KNOWN: Final[Mapping[str, Mapping[str, Any]]] = {
    # Decorators of the compiler, which would otherwise be imported to be told something.
    "torch._dynamo": {
        "disable": _not_compiled,
        # Says what the compiler need not look into; it can all the same.
        "allow_in_graph": lambda marked: marked,
    },
    "transformers.processing_utils": {"Unpack": typing.Unpack},
}
"""What modules that are put off can be asked for without being imported."""


def _is_imported(module: str) -> bool:
    return not isinstance(sys.modules.get(module), _PutOff | None)


def _imported(module: str) -> ModuleType:
    """Import a module, in the place of what stands for it."""
    if isinstance(sys.modules.get(module), _PutOff):
        del sys.modules[module]
    return importlib.import_module(module)


def _lacks(module: ModuleType, name: str) -> AttributeError:
    return AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
