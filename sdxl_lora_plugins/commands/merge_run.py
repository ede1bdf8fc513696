"""The sums behind ``sdxl-train merge``."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from sdxl_lora_plugins.files.lowrank import of_matrix, of_product
from sdxl_lora_plugins.files.plain import PlainModule, from_svd, weight_shape
from sdxl_train import TENSOR_DTYPES, Problem, TensorEntry, UserError, write_tensors
from sdxl_train.ldm import (
    Summand,
    counted,
    delta,
    factors,
    misfit,
    parameters_of,
    read_header,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from sdxl_lora_plugins.files.base import BaseWeights
    from sdxl_train.ldm import NetworkFile, Origin, StoredModule


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A layer's share in a sum."""

    module: StoredModule
    tensors: Mapping[str, Tensor]
    ratio: float


def merged_modules(
    pairs: Sequence[tuple[NetworkFile, float]], names: Iterable[str], rank: int | None
) -> Iterator[PlainModule]:
    """Yield the sums of the deltas of networks, layer by layer.

    Raises:
        UserError: If a layer has different shapes in two networks.
    """
    with ExitStack() as opened:
        readers = [(file, ratio, opened.enter_context(file.weights())) for file, ratio in pairs]
        for name in names:
            yield _sum(
                [
                    _Part(module=module, tensors=read(module), ratio=ratio)
                    for file, ratio, read in readers
                    if (module := file.modules.get(name))
                ],
                rank,
            )


def _sum(parts: Sequence[_Part], rank: int | None) -> PlainModule:
    layer = parts[0].module.layer
    shapes = {weight_shape(part.module, None) for part in parts}
    if len({(shape[0], torch.Size(shape[1:]).numel()) for shape in shapes}) > 1:
        raise UserError.of(layer.kohya, f"has different shapes in the networks: {sorted(shapes)}")
    shape = max(shapes, key=len)
    products = [(part, factors(part.module, part.tensors)) for part in parts]
    known = [(part.ratio, *product) for part, product in products if product is not None]
    if len(known) < len(parts):
        matrices = [part.ratio * _matrix(part) for part in parts]
        return from_svd(layer, shape, of_matrix(torch.stack(matrices).sum(0), rank))
    up = torch.cat([ratio * up for ratio, up, _ in known], dim=1)
    down = torch.cat([down for _, _, down in known])
    if rank is not None:
        return from_svd(layer, shape, of_product(up, down).cut(rank))
    return PlainModule(layer=layer, shape=shape, up=up, down=down, alpha=float(len(down)))


def _matrix(part: _Part) -> Tensor:
    found = delta(part.module, part.tensors)
    assert found is not None
    return found.flatten(1)


class Place(NamedTuple):
    """What one network adds to a tensor of a base model.

    Attributes:
        number: Which network.
        module: Its delta.
        origin: Where in the tensor.
        parameter: ``weight`` or ``bias``.
    """

    number: int
    module: StoredModule
    origin: Origin
    parameter: str


class ModelMerge:
    """Networks to be added to the weights of a base model."""

    def __init__(self, base: BaseWeights, pairs: Sequence[tuple[NetworkFile, float]]) -> None:
        self._base = base
        self._pairs = pairs
        self._readers: list[Callable[[StoredModule], dict[str, Tensor]]] = []
        self._absent: dict[Path, list[str]] = {}
        self.places: dict[str, list[Place]] = {}
        """What is added to each tensor."""
        for number, (file, _) in enumerate(pairs):
            for module in file.modules.values():
                for parameter in parameters_of(module):
                    origin = base.origin(module.layer, parameter)
                    if origin is None:
                        self._absent.setdefault(file.path, []).append(module.name)
                    else:
                        place = Place(number, module, origin, parameter)
                        self.places.setdefault(origin.name, []).append(place)

    def problems(self) -> Iterator[Problem]:
        """Yield what does not fit the base model."""
        for path, names in self._absent.items():
            yield Problem(
                place=str(path), message=f"the base model has no {counted(names, 'layer')}"
            )
        for name, places in self.places.items():
            whole = torch.empty(self._base.shape(name), device="meta")
            for number, module, origin, parameter in places:
                stored = origin.take(whole).shape
                if parameter == "weight" and (message := misfit(module, stored)):
                    yield Problem(place=str(self._pairs[number][0].path), message=message)

    def write(
        self,
        path: Path,
        dtype_or: Callable[[torch.dtype], torch.dtype],
        count: Callable[[], object],
    ) -> None:
        """Write the model with its weights merged, everything else as it is.

        Args:
            path: The file, or the folder where the model is one.
            dtype_or: Gives the dtype in which one that is stored is written.
            count: Is called after each tensor.
        """
        with ExitStack() as opened:
            self._readers = [opened.enter_context(file.weights()) for file, _ in self._pairs]
            if not self._base.is_folder:
                self._write_file(self._base.path, path, dtype_or, count)
                return
            folder = opened.enter_context(_replacing_folder(path))
            self._base.copy_others(folder)
            for file in dict.fromkeys(self._base.places.values()):
                target = folder / file.relative_to(self._base.path)
                self._write_file(file, target, dtype_or, count)

    def _write_file(
        self,
        source: Path,
        target: Path,
        dtype_or: Callable[[torch.dtype], torch.dtype],
        count: Callable[[], object],
    ) -> None:
        header = read_header(source)
        entries = {}
        for name, shape in header.shapes.items():
            dtype = TENSOR_DTYPES[header.dtypes[name]]
            dtype = dtype_or(dtype) if dtype.is_floating_point else dtype
            entries[name] = TensorEntry(dtype, shape)
        prefix = self._base.prefix_of(source)

        def merged(name: str) -> Tensor:
            count()
            return self._merged(prefix + name)

        write_tensors(target, entries, merged, header.metadata)

    def _merged(self, name: str) -> Tensor:
        stored = self._base.read(name)
        if name not in self.places:
            return stored
        untouched, merged = stored.float(), stored.float().clone()
        for number, module, origin, parameter in self.places[name]:
            summand = Summand(module, self._readers[number], self._pairs[number][1])
            summand.add_to(origin.take(merged), parameter, origin.take(untouched))
        return merged


@contextmanager
def _replacing_folder(path: Path) -> Iterator[Path]:
    """Give a folder that takes the name of ``path``, and its place, only when it is complete."""
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(path.parent.stat().st_mode & 0o777)
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
