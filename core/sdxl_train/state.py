"""The full state of a run on disk: a folder of safetensors and JSON, complete or not there.

Nothing is pickled. A state holds the weights as they train, the optimizer, the schedule and a
manifest; random streams and the position in the data derive from the step (see :mod:`.rng`) and
need no room. The folder is made under another name and renamed when every file in it is on disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence  # noqa: TC003 - pydantic needs them
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from sdxl_train._version import __version__
from sdxl_train.checkpoint import STEMS, require_finite
from sdxl_train.disk import require_room
from sdxl_train.errors import TrainingError, UserError
from sdxl_train.files import sync_folder
from sdxl_train.packing import pack, unpack

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor
    from torch.optim.lr_scheduler import LRScheduler

SCHEMA_VERSION = 4
MANIFEST = "state.json"
"""Written last: a folder without it is no state."""
_FOLDER_NAME = re.compile(r"(?:\.(?=.*-state\.))?(.+)-state(?:\.[^.]+(?:\.old)?)?")
_PARAMETERS, _TENSORS = "parameters.safetensors", "optimizer.safetensors"
_DETAILS = "details.json"
WEIGHT_FILES = (MANIFEST, _PARAMETERS)
"""What is read with ``--reset_optimizer``."""
FILES = (*WEIGHT_FILES, _TENSORS, _DETAILS)
_MALFORMED = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
_OTHER_STATE = "resume from another state, or take only the weights with --reset_optimizer"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a state is of; compared before a run goes on from it.

    Attributes:
        step: Optimizer steps done.
        total: Optimizer steps of the run that saved it.
        seed: Seed of the run.
        options: Value of every option that shapes the training.
        dataset: Digest of the images, captions and buckets.
        model: Identity of the base model.
        plugins: Version of each plugin by name.
        observers: Names of the observers that keep something in it.
        batch_sizes: Samples of a batch of each dataset, for each process.
        processes: How many trained together.
    """

    step: int
    total: int
    seed: int
    options: Mapping[str, Any]
    dataset: str
    model: str
    plugins: Mapping[str, str]
    observers: Sequence[str] = ()
    batch_sizes: Sequence[int] = ()
    processes: int = 1
    sdxl_train: str = __version__
    schema_version: int = SCHEMA_VERSION


def read_manifest(folder: Path) -> Manifest:
    """Read what a state is of. Imports no torch.

    Raises:
        UserError: If the folder is no complete state, or one of a later version.
    """
    try:
        document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except OSError:
        raise UserError.of(
            str(folder), f"is no complete state: it has no {MANIFEST}", states_nearby(folder)
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError.of(str(folder / MANIFEST), f"is not JSON: {error}") from None
    versions = document if isinstance(document, dict) else {}
    if versions.get("schema_version") != SCHEMA_VERSION:
        raise UserError.of(
            str(folder),
            f"has schema version {versions.get('schema_version')}, written by sdxl-train "
            f"{versions.get('sdxl_train')}; this one reads {SCHEMA_VERSION}",
            "use the version that wrote it",
        )
    try:
        return TypeAdapter(Manifest).validate_python(document)
    except ValidationError as error:
        place = ".".join(str(key) for key in error.errors()[0]["loc"])
        message = f"is corrupt: {place}: {error.errors()[0]['msg']}"
        raise UserError.of(str(folder / MANIFEST), message, "resume from another state") from None


def complete_states(folder: Path, stem: str | None = None) -> list[tuple[int, Path]]:
    """Give the complete states in a folder with their steps, the newest last.

    Ordered by step: clocks and file times can lie. With ``stem``, only those of that run's name.
    """
    found = []
    for path in folder.glob(f"*-state*/{MANIFEST}"):
        # A kill between two renames leaves a whole state under its temporary name.
        named = _FOLDER_NAME.fullmatch(path.parent.name)
        if named and (stem is None or re.fullmatch(rf"{re.escape(stem)}(-(step)?\d+)?", named[1])):
            try:
                found.append((read_manifest(path.parent).step, path.parent))
            except UserError:
                continue
    return sorted(found)


def run_name(folder: Path) -> str:
    """Give the name of the files of the run that saved a state, by that of the state's folder."""
    named = _FOLDER_NAME.fullmatch(folder.name)
    name = re.sub(r"-(step\d{8}|\d{6})$", "", named[1]) if named else folder.name
    # Without a name, each kind of file has one of its own; the record is of the last kind.
    return STEMS["final"] if name in STEMS.values() else name


def save_state(
    folder: Path,
    manifest: Manifest,
    *,
    parameters: Sequence[Tensor],
    optimizer: Mapping[str, Any],
    scheduler: LRScheduler,
    scaler: torch.amp.GradScaler | None,
    observers: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write a state; a state of that name stays whole until the new one is.

    Args:
        folder: The folder to be.
        manifest: What the state is of.
        parameters: What trains.
        optimizer: The state of its optimizer.
        scheduler: The schedule of its rates.
        scaler: The gradient scaler, if there is one.
        observers: What observers keep, by their names.

    Raises:
        TrainingError: If a value is not finite or has no place in a file, or it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    watched: dict[str, Tensor] = {}
    try:
        details = {
            "optimizer": pack(dict(optimizer), tensors, "optimizer"),
            "scheduler": _packable(scheduler.state_dict(), tensors),
            "scaler": scaler.state_dict() if scaler else None,
            "observers": pack(dict(observers or {}), watched, "observers"),
        }
    except TypeError as error:
        raise TrainingError(f"state {folder} cannot be written: {error}") from error
    weights = {str(index): parameter for index, parameter in enumerate(parameters)}
    require_finite({**{f"parameter {name}": t for name, t in weights.items()}, **tensors}, folder)
    tensors |= watched  # which may hold what they like
    needed = sum(t.numel() * t.element_size() for t in (*weights.values(), *tensors.values()))
    require_room(folder.parent, needed, folder.name)
    try:
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            _write_tensors(temporary / _PARAMETERS, weights)
            _write_tensors(temporary / _TENSORS, tensors)
            _write_json(temporary / _DETAILS, details)
            _write_json(temporary / MANIFEST, asdict(manifest))
            temporary.chmod(folder.parent.stat().st_mode & 0o777)
            sync_folder(temporary)
            _replace_folder(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise TrainingError(f"state {folder} cannot be written: {error.strerror}") from error


def load_parameters(folder: Path, parameters: Sequence[Tensor]) -> None:
    """Put the trained parameters back, bit for bit.

    Raises:
        UserError: If the file is corrupt, or of other parameters.
    """
    saved = _read_tensors(folder / _PARAMETERS)
    shapes = [list(saved[str(i)].shape) for i in range(len(saved)) if str(i) in saved]
    if shapes != [list(parameter.shape) for parameter in parameters]:
        raise UserError.of(
            str(folder),
            f"holds {len(saved)} parameters of other shapes than the {len(parameters)} that train",
            "set the network's options as they were",
        )
    for index, parameter in enumerate(parameters):
        parameter.detach().copy_(saved[str(index)])


def load_optimizer(
    folder: Path,
    *,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None,
    scaler: torch.amp.GradScaler | None,
) -> None:
    """Put optimizer, schedule and gradient scaler back; ``scheduler`` None leaves that one alone.

    Raises:
        UserError: If a file is corrupt, or of other parameters.
    """
    details = _read_details(folder)
    with well_formed(folder, "its optimizer state does not fit"):
        optimizer.load_state_dict(details["optimizer"])
        if scheduler is not None:
            scheduler.load_state_dict(details["scheduler"])
        if scaler is not None and details["scaler"]:
            scaler.load_state_dict(details["scaler"])


def load_observers(folder: Path) -> dict[str, dict[str, Any]]:
    """Give what observers kept, by their names.

    Raises:
        UserError: If a file is corrupt.
    """
    with well_formed(folder / _DETAILS):
        kept: dict[str, dict[str, Any]] = _read_details(folder)["observers"]
    return kept


@contextmanager
def well_formed(place: Path, fault: str = "is corrupt") -> Iterator[None]:
    """Tell of content that was edited, or is of another program, where it is put to use.

    Raises:
        UserError: In place of what such content raises.
    """
    try:
        yield
    except _MALFORMED as error:
        reason = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else error
        raise UserError.of(str(place), f"{fault}: {reason}", _OTHER_STATE) from error


def _read_details(folder: Path) -> dict[str, Any]:
    """Give what a state holds beside the parameters."""
    tensors = _read_tensors(folder / _TENSORS)
    with well_formed(folder / _DETAILS):
        packed = json.loads((folder / _DETAILS).read_text(encoding="utf-8"))
        details: dict[str, Any] = unpack(packed, tensors)
    return details


def _packable(state: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Leave out of a scheduler's state what its constructor makes anew (functions, optimizers)."""
    kept = {}
    for name, value in state.items():
        try:
            kept[name] = pack(value, tensors, f"scheduler.{name}")
        except TypeError:
            continue
    return kept


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    import safetensors.torch

    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous()
        # Groups may share a tensor (Prodigy's estimate), which safetensors refuses.
        plain[name] = data.clone() if data.data_ptr() in seen else data
        seen.add(data.data_ptr())
    _write(path, safetensors.torch.save(plain))


def _read_tensors(path: Path) -> dict[str, Tensor]:
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        return safetensors.torch.load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        remedy = "resume from another state" if path.name == _PARAMETERS else _OTHER_STATE
        raise UserError.of(str(path), f"is corrupt: {error}", remedy) from None


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    _write(path, json.dumps(document, indent=1).encode())


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _replace_folder(new: Path, final: Path) -> None:
    """Rename ``new`` to ``final``; a folder cannot be renamed onto one that holds files."""
    old = new.with_name(f"{new.name}.old")
    if final.exists():
        final.rename(old)
    new.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def states_nearby(folder: Path) -> str:
    """Name the complete states in a folder that is none, and beside it; empty without any."""
    found = [path for place in (folder, folder.parent) for _, path in complete_states(place)]
    near = [path for path in found if path != folder]
    return f"states here: {', '.join(str(path) for path in near[-5:])}" if near else ""
