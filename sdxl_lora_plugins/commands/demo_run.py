"""The demo from its base model to the pictures drawn without and with the LoRA."""

from __future__ import annotations

import logging
import random
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import tomli_w
import torch

from sdxl_lora_plugins.commands import demo_images
from sdxl_lora_plugins.commands.demo_effect import RANK, Showing, compare
from sdxl_lora_plugins.commands.demo_images import ZOG
from sdxl_lora_plugins.commands.demo_model import make_base_model
from sdxl_train import train

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sdxl_lora_plugins.commands.demo_folder import DemoFolder
    from sdxl_lora_plugins.commands.demo_images import Pictures

_log = logging.getLogger(__name__)

_SEED: Final = 2
_NUM_ZOGS: Final = 8


def run_demo(folder: DemoFolder, *, base_steps: int, steps: int) -> int:
    """Run the demo in its folder and give the exit code."""
    with _for_tiny_models():
        _log.info("1/4  making a tiny SDXL that draws red, green and blue shapes")
        make_base_model(folder.model, steps=base_steps, seed=_SEED)
        _log.info("2/4  drawing %d pictures of a zog, a word it has never read", _NUM_ZOGS)
        zogs = _write_data(folder)
        _log.info("3/4  training a LoRA on them: sdxl-train --config_file %s", folder.options)
        folder.options.write_text(tomli_w.dumps(_options(folder, steps)), encoding="utf-8")
        result = train(folder.options)
        if result.exit_code:
            return result.exit_code
        (lora,) = result.files
        _log.info("4/4  reading the LoRA back, and drawing without and with it")
        before, after = compare(folder.model, lora, zogs, seed=_SEED)
    _write_sheets(folder, zogs, before, after)
    folder.record({"status": "complete", "loss_before": before.loss, "loss_after": after.loss})
    sys.stdout.write(
        f"loss on the zogs, same noise and timesteps: {before.loss:.3f} without the LoRA, "
        f"{after.loss:.3f} with it\n"
        f"LoRA      {lora}\n"
        f"pictures  {folder.before_after}, {folder.before.name}, {folder.after.name}\n"
        f"all in    {folder.path.resolve()}\n"
    )
    return 0


@contextmanager
def _for_tiny_models() -> Iterator[None]:
    """Compute on one thread, and keep the loading of models from the log.

    Tensors this small gain nothing from a second thread, and where something else is running they
    wait for it longer than they compute.
    """
    threads, log = torch.get_num_threads(), logging.getLogger("sdxl_train.ldm")
    level = log.level
    torch.set_num_threads(1)
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        log.setLevel(level)


def _write_data(folder: DemoFolder) -> Pictures:
    """Write the training pictures, which are returned, and those of what must not be forgotten."""
    chance = random.Random(_SEED + 1)
    zogs = [demo_images.draw(ZOG, chance) for _ in range(_NUM_ZOGS)]
    demo_images.write_data_folder(folder.images / "10_zog", {ZOG: zogs})
    shapes = {c: [demo_images.draw(c, chance)] for c in demo_images.shape_captions()}
    demo_images.write_data_folder(folder.regularization / "1_shape", shapes)
    return zogs


def _options(folder: DemoFolder, steps: int) -> dict[str, Any]:
    """Give the options of the training run, under the names of the command line."""
    return {
        "pretrained_model_name_or_path": str(folder.model),
        "train_data_dir": str(folder.images),
        "reg_data_dir": str(folder.regularization),
        "caption_extension": ".txt",
        "resolution": demo_images.SIZE,
        "cache_latents": True,
        "cache_text_encoder_outputs": True,
        "max_data_loader_n_workers": 0,
        "output_dir": str(folder.output),
        "output_name": "zog",
        "network_module": "networks.lora",
        "network_dim": RANK,
        "network_alpha": RANK,
        "network_train_unet_only": True,
        # Far above what suits SDXL: the smaller the network, the larger the steps it bears.
        "learning_rate": 8e-3,
        "lr_scheduler": "cosine",
        "train_batch_size": 16,
        "max_train_steps": steps,
        "seed": _SEED,
    }


def _write_sheets(folder: DemoFolder, zogs: Pictures, before: Showing, after: Showing) -> None:
    groups = {"without the LoRA": before.drawn, "with the LoRA": after.drawn}
    trained = {"trained on": {ZOG: zogs[:2]}}
    demo_images.sheet({"without the LoRA": before.drawn}).save(folder.before)
    demo_images.sheet({"with the LoRA": after.drawn}).save(folder.after)
    demo_images.sheet({**trained, **groups}).save(folder.before_after)
