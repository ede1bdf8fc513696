"""``NAME.run.json``: all that is known of a run, for machines, while it goes and afterwards.

docs/run-record.md says what is in it. The report and ``compare`` show this document and nothing
else.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_train._version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

    from sdxl_train.config import RunConfig
    from sdxl_train.history import History

SCHEMA_VERSION = 2
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors")
_COMPACT = ("history", "loss_by_image", "notes")
"""Parts that are long, so each on one line."""
_NOT_REPEATED = ("config_file", "output_config", "resume", "overwrite", "plugin")


def write_document(document: Mapping[str, Any]) -> bytes:
    """Write a document as JSON that people can read too."""
    parts = [
        f"{json.dumps(name)}: {_part(name, value)}".replace("\n", "\n  ")
        for name, value in document.items()
    ]
    # Names of files that are no UTF-8 hold lone surrogates, which stay as JSON's escapes.
    return ("{\n  " + ",\n  ".join(parts) + "\n}\n").encode(errors="backslashreplace")


def _part(name: str, value: object) -> str:
    return json.dumps(value, indent=None if name in _COMPACT else 2, ensure_ascii=False)


def earlier_notes(path: Path) -> dict[str, Any]:
    """Give what observers noted in a document that is there; nothing if there is none to read."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(document, dict) or document.get("schema_version") != SCHEMA_VERSION:
        return {}
    notes: dict[str, Any] = document["notes"]
    return notes


def command(config: RunConfig, seed: int) -> list[str]:
    """Give the words of a command line that repeats the run: every option that was set, the seed.

    Secrets are left out.
    """
    words = ["sdxl-train"]
    tables: dict[str, list[str]] = {}
    left_out = {*_NOT_REPEATED, *config.secrets(), "seed"}
    plugins = config.host.plugin
    if plugins:
        words += ["--plugin", *plugins]
    for name, item in config.options().items():
        value = item["value"]
        table, dot, key = name.partition(".")
        if name in left_out or item["origin"] == "default" or value is None:
            continue
        if dot:
            tables.setdefault(table, []).append(f"{key}={value}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif isinstance(value, bool):
            words += [f"--{name}"] if value else [f"--{name}", "false"]
        else:
            words += [f"--{name}", str(value)]
    for name, pairs in tables.items():
        words += [f"--{name}", *pairs]
    return [*words, "--seed", str(seed)]


def software() -> dict[str, Any]:
    """Give the versions of what computes."""
    return {
        "sdxl_train": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine."""
    import torch

    on_gpu = device.type == "cuda"
    return {
        "platform": platform.platform(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "cuda": torch.version.cuda if on_gpu else None,
    }


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Give the most memory that was in use so far: of the GPU, or else of the process."""
    import torch

    if device.type == "cuda":
        return {"of": "GPU", "peak_bytes": torch.cuda.max_memory_allocated(device)}
    return {"of": "process", "peak_bytes": _peak_of_process()}


def _peak_of_process() -> int | None:
    if (told := _status().get("VmHWM")) is not None:
        return told
    if sys.platform == "win32":
        return None
    import resource

    # Linux's has the peak of the process in it that started this one, which may be a large one.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def memory_now() -> int:
    """Give the bytes that this process has in main memory; at most, where only that is known."""
    return _status().get("VmRSS") or _peak_of_process() or 0


def _status() -> dict[str, int]:
    """Give the bytes that Linux tells of this process, by their names; nothing elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    told = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(number) * 1024 for name, number, _ in told}


def speed(history: History) -> dict[str, Any]:
    """Give how fast the steps were; the median, as the first ones warm up."""
    steps = list(history.since(0))
    if not steps:
        return {"seconds_per_step": None, "samples_per_second": None, "seconds": 0.0}
    seconds = sum(step.seconds for step in steps)
    return {
        "seconds_per_step": round(statistics.median(step.seconds for step in steps), 6),
        "samples_per_second": round(
            statistics.median(step.samples / step.seconds for step in steps), 6
        ),
        "seconds": round(seconds, 3),
    }


def with_paths(images: Iterable[dict[str, Any]], paths: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Add to each image where it lies."""
    return [
        {**image, "path": str(paths[image["image"]]) if image["image"] in paths else None}
        for image in images
    ]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
