"""Trackers: what is logged where. Light to import."""

from __future__ import annotations

import netrc
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import SecretStr  # noqa: TC002 - pydantic reads the annotations

from sdxl_train import Field, Observer, Problem, UserError, read_toml

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_train import Run, RunConfig

TrackerName: TypeAlias = Literal["tensorboard", "wandb"]
_NAMES: Final[tuple[TrackerName, ...]] = ("tensorboard", "wandb")
_PATHS: Final = frozenset(
    {
        "pretrained_model_name_or_path",
        "vae",
        "tokenizer_cache_dir",
        "train_data_dir",
        "conditioning_data_dir",
        "reg_data_dir",
        "output_dir",
        "logging_dir",
    }
)
"""Options that sd-scripts keeps from trackers: a dashboard is often public."""


class Trackers(Observer):
    """Log loss, rates, validation and sample pictures to TensorBoard or Weights & Biases."""

    log_with: Literal["tensorboard", "wandb", "all"] | None = Field(
        None, description="Tracker. Default: tensorboard, if --logging_dir is given."
    )
    logging_dir: Path | None = Field(
        None, description="Folder of logs; each run has one of its own in it, named by its time."
    )
    log_prefix: str = Field("", description="What the name of the run's log folder begins with.")
    log_tracker_name: str = Field(
        "network_train", min_length=1, description="Name of the project in the tracker."
    )
    log_tracker_config: Path | None = Field(
        None, description="TOML file with a table of settings for each tracker: [wandb] tags = ..."
    )
    log_config: bool = Field(False, description="Log the options too, without secrets and folders.")
    wandb_run_name: str | None = Field(None, description="Name of the run in Weights & Biases.")
    wandb_api_key: SecretStr | None = Field(
        None, description="Key of Weights & Biases. Better: WANDB_API_KEY, or `wandb login`."
    )

    @property
    def trackers(self) -> tuple[TrackerName, ...]:
        """The trackers in use; ``all`` are those that are installed."""
        if self.log_with == "all":
            return tuple(name for name in _NAMES if name != "wandb" or find_spec("wandb"))
        if self.log_with is None:
            return ("tensorboard",) if self.logging_dir else ()
        return (self.log_with,)

    def settings(self) -> dict[str, dict[str, Any]]:
        """Give what ``log_tracker_config`` sets, by tracker.

        Raises:
            UserError: If the file cannot be read.
        """
        if self.log_tracker_config is None:
            return {}
        document, _ = read_toml(self.log_tracker_config)
        return document

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Yield what the trackers lack."""
        if "tensorboard" in self.trackers and self.logging_dir is None:
            yield Problem(
                place=config.place("log_with"),
                message=f"{self.log_with} needs a folder to log to",
                remedy="add --logging_dir FOLDER",
            )
        if "wandb" in self.trackers and not find_spec("wandb"):
            yield Problem(
                place=config.place("log_with"),
                message="Weights & Biases is not installed",
                remedy="pip install 'sdxl-train[wandb]'",
            )
        try:
            settings = self.settings()
        except UserError as error:
            yield from error.problems
            return
        yield from self._wrong_settings(settings, config)
        if "wandb" in self.trackers and find_spec("wandb") and not self._has_key(settings):
            yield Problem(
                place=config.place("log_with"),
                message="no key of Weights & Biases is known",
                remedy="run `wandb login`, set WANDB_API_KEY, or log to disk: WANDB_MODE=offline",
            )

    def _wrong_settings(
        self, settings: dict[str, dict[str, Any]], config: RunConfig
    ) -> Iterator[Problem]:
        place = str(self.log_tracker_config)
        for name, table in settings.items():
            if name not in _NAMES or not isinstance(table, dict):
                yield Problem(
                    place=f"{place} {name}",
                    message="is no table of a tracker",
                    remedy="write [tensorboard] or [wandb], and settings below",
                )
            elif name == "wandb" and "name" in table and self.wandb_run_name is not None:
                yield Problem(
                    place=config.place("wandb_run_name"),
                    message=f"the run has a name in {place} too",
                    remedy="leave out one of them",
                )

    def _has_key(self, settings: dict[str, dict[str, Any]]) -> bool:
        """Tell whether Weights & Biases can do without asking for a key."""
        mode = settings.get("wandb", {}).get("mode") or os.environ.get("WANDB_MODE")
        if mode in ("offline", "disabled", "dryrun"):
            return True
        named = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
        return (
            self.wandb_api_key is not None
            or any(os.environ.get(name) for name in named)
            or _is_in_netrc()
        )

    def remarks(self, config: RunConfig) -> Iterator[str]:
        """Yield what has no effect."""
        if self.log_with == "all" and "wandb" not in self.trackers:
            yield f"{config.place('log_with')}: Weights & Biases is not installed: tensorboard only"
        for name in sorted(self.model_fields_set - {"log_with", "logging_dir"}):
            needed = ("wandb",) if name.startswith("wandb_") else _NAMES
            if not set(needed) & set(self.trackers):
                missing = "--log_with wandb" if needed == ("wandb",) else "--logging_dir"
                yield f"{config.place(name)} has no effect without {missing}"
        for name in self.settings_without_tracker():
            yield f"{config.place('log_tracker_config')}: [{name}] has no effect: it is not in use"

    def settings_without_tracker(self) -> list[str]:
        """Give the tables of ``log_tracker_config`` that are for trackers not in use."""
        try:
            return sorted(self.settings().keys() & (set(_NAMES) - set(self.trackers)))
        except UserError:  # a problem of its own, which `check` reports
            return []

    def logged_options(self, config: RunConfig) -> dict[str, Any]:
        """Give the options as a tracker takes them: lists and tables as text."""
        return {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in ((n, item["value"]) for n, item in config.options().items())
            if name not in _PATHS and name != "wandb_api_key" and value is not None
        }

    def build(self, run: Run) -> object:
        """Build what logs this run."""
        from sdxl_lora_plugins.observers.tracking import Tracking

        return Tracking(self, run)


def _is_in_netrc() -> bool:
    """Tell whether `wandb login` was done: it leaves the key where all programs look for keys."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    default = Path("~/_netrc" if os.name == "nt" else "~/.netrc").expanduser()
    path = Path(os.environ.get("NETRC", default))
    try:
        return host in netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return False
