"""Files of weights, of which each tensor is read when it is its turn."""

from __future__ import annotations

import logging
import re
from itertools import chain
from math import prod
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from sdxl_train.errors import UserError
from sdxl_train.ldm.headers import PICKLED, counted
from sdxl_train.ldm.unfilled import fill
from sdxl_train.ldm.unread import Reader, stamps_of
from sdxl_train.tensor_file import TENSOR_DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from sdxl_train.ldm.headers import Header
    from sdxl_train.ldm.origins import Origin

_log = logging.getLogger(__name__)

_HARMLESS = re.compile(
    r"(.*\.)?(position_ids|logit_scale|sigmas|log_sigmas|sigma_(min|max)|v_pred|ztsnr)$"
    r"|(model\.)?(betas|alphas_cumprod.*|sqrt_.*|log_one_minus.*|posterior_.*|logvar)$"
    r"|model_ema\.|denoiser\.|first_stage_model\.loss\."
)
"""Names that carry no weight of these parts: buffers, schedules, markers, averaged copies."""

_PIECE = 1 << 27
"""Numbers that are read between two openings of a file."""


class WeightFiles:
    """Files that together hold parts of a model.

    Args:
        headers: Of the files.
        place: Where they come from, for people.
        remedy: What to do if they hold other parts than they should.
        mapped: Map safetensors files; else read each tensor as any bytes of a file.
    """

    def __init__(self, headers: Sequence[Header], *, place: str, remedy: str, mapped: bool) -> None:
        self.shapes = {name: shape for header in headers for name, shape in header.shapes.items()}
        self._homes = {name: header for header in headers for name in header.shapes}
        self._files = tuple(header.path for header in headers)
        self._stamps = stamps_of(self._files)
        self._place = place
        self._remedy = remedy
        self._mapped = mapped
        self._used: set[str] = set()

    def reader(
        self,
        module: nn.Module,
        origins: Mapping[str, Origin],
        device: torch.device,
        title: str,
    ) -> Reader:
        """Give what reads a part that has shapes only; on the meta device it stays so.

        Args:
            module: The part.
            origins: Where each of its parameters is, by its path.
            device: Where the part goes.
            title: What it is called.

        Raises:
            UserError: If tensors are missing or of another shape.
        """
        self._check(module, origins, title)
        self._used.update(origin.name for origin in origins.values())

        def read() -> None:
            # First what is laid out anew: a view of the file would keep its pages in memory too.
            wanted = module.state_dict().items()
            turned = {path for path, weight in wanted if not weight.is_contiguous()}
            first = {path: origin for path, origin in origins.items() if path in turned}
            others = {path: origin for path, origin in origins.items() if path not in turned}
            tensors = chain(self._tensors(first), self._tensors(others))
            fill(module, tensors, device, title=title, place=self._place)

        is_plan = device.type == "meta"
        return Reader(files=self._files, stamps=self._stamps, read=None if is_plan else read)

    def leave_out(self, is_left_out: Callable[[str], bool]) -> None:
        """Expect no use of the tensors with such names."""
        self._used.update(filter(is_left_out, self.shapes))

    def warn_of_unused(self, name: str) -> None:
        """Log once how many tensors belong to nothing that trains or is trained on.

        Args:
            name: What holds them, for people.
        """
        left = [key for key in self.shapes if key not in self._used and not _HARMLESS.match(key)]
        if left:
            _log.warning("%s holds unknown tensors, which are not used: %s", name, counted(left))

    def _tensors(self, origins: Mapping[str, Origin]) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter's values as they are stored, as a view of the file if it can be."""
        for file in self._files:
            here = {path: o for path, o in origins.items() if self._homes[o.name].path == file}
            if file.suffix.lower() in PICKLED:
                tensors = _unpickled(file) if here else {}
                for path, origin in here.items():
                    yield path, origin.take(tensors[origin.name])
                continue
            if not self._mapped:
                yield from self._read_bytes(file, here)
                continue
            for some in self._in_pieces(here):
                # A file that is mapped anew gives back the pages of the tensors that were copied.
                with safe_open(file, framework="pt") as opened:
                    for path, origin in some.items():
                        yield path, origin.take(opened.get_tensor(origin.name))

    def _read_bytes(
        self, file: Path, origins: Mapping[str, Origin]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield parameters from a file that is not mapped, in the order in which they are in it."""
        headers = {path: self._homes[origin.name] for path, origin in origins.items()}
        places = {path: headers[path].places[origin.name] for path, origin in origins.items()}
        with file.open("rb") as opened:
            for path in sorted(origins, key=lambda path: places[path]):
                origin, (start, end) = origins[path], places[path]
                read = torch.empty(end - start, dtype=torch.uint8)
                opened.seek(start)
                if opened.readinto(read.numpy().data) < len(read):
                    message = f"ended in the middle of {origin.name}"
                    raise UserError.of(str(file), message, "start again with the whole file")
                dtype = TENSOR_DTYPES[headers[path].dtypes[origin.name]]
                values = origin.take(read.view(dtype).view(self.shapes[origin.name]))
                # A view of a third of it would keep the whole.
                yield path, values if origin.third is None else values.clone()

    def _in_pieces(self, origins: Mapping[str, Origin]) -> Iterator[dict[str, Origin]]:
        """Give the parameters in pieces of not much more than a quarter of a gigabyte."""
        piece: dict[str, Origin] = {}
        numbers = 0
        for path, origin in origins.items():
            piece[path] = origin
            numbers += prod(self.shapes[origin.name])
            if numbers > _PIECE:
                yield piece
                piece, numbers = {}, 0
        yield piece

    def _check(self, module: nn.Module, origins: Mapping[str, Origin], title: str) -> None:
        """Raise UserError for tensors that are missing or of another shape."""
        if missing := sorted({origin.name for origin in origins.values()} - self.shapes.keys()):
            text = f"the {title} lacks {counted(missing)}"
            raise UserError.of(self._place, text, "use a complete model, or download it again")
        wanted = module.state_dict()
        wrong = []
        for path, origin in origins.items():
            stored = torch.empty(self.shapes[origin.name], device="meta")
            if origin.take(stored).shape != wanted[path].shape:
                wrong.append(origin.name)
        if wrong:
            text = f"the {title} has shapes that do not fit in {counted(wrong)}"
            raise UserError.of(self._place, text, self._remedy)


def _unpickled(file: Path) -> Mapping[str, Tensor]:
    from sdxl_train.ldm.pickled import read_tensors

    return read_tensors(file)
