"""The smallest family of models that trains: a base for a real one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_train import Model, Problem, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch
    from sdxl_train import PredictionType, RunConfig

    from sdxl_train_example.loaded import Loaded


class ExampleModel(Model):
    """Models of example: one .safetensors file each."""

    def predicts(self) -> PredictionType | None:
        """Give what the denoiser predicts."""
        return "epsilon"

    def check(self, config: RunConfig) -> Iterator[Problem]:
        """Refuse a path that is no file, before any work starts."""
        from pathlib import Path

        if not Path(self.pretrained_model_name_or_path).is_file():
            yield Problem(
                place=config.place("pretrained_model_name_or_path"),
                message=f"{self.pretrained_model_name_or_path} is no file",
                remedy="name a .safetensors file",
            )

    def build(self, device: torch.device | str, dtype: torch.dtype) -> Loaded:
        """Load the model; on the device ``meta`` without its weights.

        Raises:
            UserError: If the file is none of this family.
        """
        import torch
        from safetensors.torch import load_file

        from sdxl_train_example.loaded import Loaded, Modules

        place = torch.device(device)
        # No weights of its own: those of the file take their place, and nothing is drawn.
        with torch.device("meta"):
            modules = Modules()
        if place.type != "meta":
            state = load_file(self.pretrained_model_name_or_path, device=str(place))
            try:
                modules.load_state_dict(state, assign=True)
            except RuntimeError as error:
                raise UserError.of(
                    self.pretrained_model_name_or_path, f"is no model of example: {error}"
                ) from None
        return Loaded(modules.to(dtype).requires_grad_(False).eval(), place)

    @classmethod
    def write_tiny(cls, path: Path, *, seed: int = 0) -> Path:
        """Write a random model to ``path`` with the ending .safetensors."""
        import torch
        from safetensors.torch import save_file

        from sdxl_train_example.loaded import Modules

        path = path.with_suffix(".safetensors")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            save_file(Modules().state_dict(), path)
        return path
