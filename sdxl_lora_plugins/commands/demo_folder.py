"""The folder of a demo: what lies where in it, and whose it is."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdxl_train import UserError, __version__

if TYPE_CHECKING:
    from pathlib import Path

_MARK = "demo.json"
"""The record of a demo; by it a folder is known to be one."""
_MAKER = "sdxl-train demo"


@dataclass(frozen=True, kw_only=True)
class DemoFolder:
    """A folder that this demo may write to."""

    path: Path

    @classmethod
    def claim(cls, path: Path) -> DemoFolder:
        """Make the folder, or empty it of an earlier demo.

        What a user has put beside the demo's own files is left alone.

        Raises:
            UserError: If something else is there, or the folder cannot be written.
        """
        folder = cls(path=path.expanduser())
        try:
            if folder.path.is_symlink() or folder.path.exists():
                folder._refuse_foreign()
            folder._clear()
            folder.path.mkdir(parents=True, exist_ok=True)
            # First of all, so that the folder of an interrupted demo is known as one.
            folder.record({"status": "unfinished"})
        except OSError as error:
            raise UserError.of(
                str(folder.path), f"cannot be written: {error.strerror}", "name another folder"
            ) from error
        return folder

    @property
    def model(self) -> Path:
        """The base model, a diffusers folder."""
        return self.path / "model"

    @property
    def images(self) -> Path:
        """The training data: a folder of ``N_name`` folders."""
        return self.path / "images"

    @property
    def regularization(self) -> Path:
        """Regularization images, laid out like the training data."""
        return self.path / "reg"

    @property
    def options(self) -> Path:
        """The options of the training run, a TOML file."""
        return self.path / "lora.toml"

    @property
    def output(self) -> Path:
        """Where the training run writes."""
        return self.path / "lora"

    @property
    def before(self) -> Path:
        """Pictures drawn without the LoRA."""
        return self.path / "before.png"

    @property
    def after(self) -> Path:
        """Pictures drawn with the LoRA, from the same prompts and noise."""
        return self.path / "after.png"

    @property
    def before_after(self) -> Path:
        """Both, side by side."""
        return self.path / "before-after.png"

    def record(self, facts: dict[str, Any]) -> None:
        """Write what is to be said of the demo."""
        content = {"made_by": _MAKER, "version": __version__, **facts}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (self.path / _MARK).write_text(text, encoding="utf-8")

    def _refuse_foreign(self) -> None:
        if not self.path.is_dir():
            raise UserError.of(str(self.path), "is not a folder", "name another one")
        if any(self.path.iterdir()) and not self._is_demo():
            raise UserError.of(
                str(self.path),
                "holds something that is not a demo, and is left as it is",
                "name another folder: sdxl-train demo DIR",
            )

    def _is_demo(self) -> bool:
        try:
            record = json.loads((self.path / _MARK).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return False
        return isinstance(record, dict) and record.get("made_by") == _MAKER

    def _clear(self) -> None:
        for tree in (self.model, self.images, self.regularization, self.output):
            if tree.is_dir():
                shutil.rmtree(tree)
        for file in (self.options, self.before, self.after, self.before_after):
            file.unlink(missing_ok=True)
