"""The built-in model family, observers and commands keep the contracts of their kinds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdxl_lora_plugins.commands.inspect import Inspect
from sdxl_lora_plugins.model import Sdxl
from sdxl_lora_plugins.observers.ema import Ema
from sdxl_lora_plugins.observers.progress import Progress
from sdxl_lora_plugins.observers.report import Report
from sdxl_lora_plugins.observers.trackers import Trackers
from sdxl_train.testing import CommandContract, ModelContract, ObserverContract


class TestSdxl(ModelContract):
    component = Sdxl


class TestSdxlOfVelocity(ModelContract):
    component = Sdxl
    options = {
        "v_parameterization": True,
        "zero_terminal_snr": True,
        "network_train_unet_only": True,
    }


class TestProgress(ObserverContract):
    component = Progress


class TestEma(ObserverContract):
    component = Ema
    options = {"ema_decay": 0.9}


class TestReport(ObserverContract):
    component = Report


class TestTrackers(ObserverContract):
    component = Trackers

    @pytest.fixture(autouse=True)
    def logs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(type(self), "options", {"logging_dir": tmp_path, "log_config": True})


def write_lora(path: Path) -> None:
    layer = "lora_unet_output_blocks_0_1_transformer_blocks_0_attn1_to_q"
    save_file(
        {
            f"{layer}.lora_down.weight": torch.ones(2, 8),
            f"{layer}.lora_up.weight": torch.ones(8, 2),
            f"{layer}.alpha": torch.tensor(1.0),
        },
        path,
    )


class TestInspect(CommandContract):
    component = Inspect
    options = {"model": Path("lora.safetensors")}
    mistakes = [{"model": Path("gone.safetensors")}]

    def prepare(self, folder: Path) -> None:
        write_lora(folder / "lora.safetensors")
