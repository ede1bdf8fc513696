"""Every name that the guides give an optimizer, a schedule, a noise, ... trains three steps.

The names are those of sd-scripts' guides and of its documented choices. Each goes through the
command line in this process, on cached latents and text; one whole command of the SDXL guide runs
as a process of its own.
"""

from __future__ import annotations

import itertools
import json
from importlib import resources
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdxl_train.cli import main

if TYPE_CHECKING:
    from pathlib import Path

    from tests.end_to_end.conftest import StartCommand

OPTIMIZERS = (
    *("AdamW", "Adam", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "SGD"),
    *("SGDNesterov", "adamw", "torch.optim.AdamW"),
    *("AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit", "Lion8bit", "PagedLion8bit"),
    *("SGDNesterov8bit", "AdEMAMix8bit", "bitsandbytes.optim.AdEMAMix8bit"),
)
ONE_RATE_OPTIMIZERS = (
    *("Prodigy", "DAdaptation", "DAdaptAdamPreprint", "DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan"),
    *("DAdaptAdanIP", "DAdaptLion", "DAdaptSGD"),
)
OPTIMIZERS_OF_THEIR_OWN_SCHEDULE = (
    *("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree", "Adafactor"),
    "Adafactor --lr_scheduler adafactor --fused_backward_pass",
    "Adafactor --optimizer_args relative_step=False scale_parameter=False warmup_init=False",
)
SCHEDULERS: dict[str, str] = {
    "constant": "",
    "constant_with_warmup": "--lr_warmup_steps 1",
    "linear": "--lr_warmup_steps 34%",
    "cosine": "--lr_warmup_steps 0.34",
    "cosine_with_restarts": "--lr_scheduler_num_cycles 2",
    "polynomial": "--lr_scheduler_power 2",
    "inverse_sqrt": "--lr_warmup_steps 1 --lr_scheduler_timescale 100",
    "cosine_with_min_lr": "--lr_scheduler_min_lr_ratio 0.1",
    "cosine_warmup_with_min_lr": "--lr_scheduler_min_lr_ratio 0.1 --lr_warmup_steps 1",
    "warmup_stable_decay": "--lr_warmup_steps 1 --lr_decay_steps 1",
    "piecewise_constant": "--lr_scheduler_args step_rules=1:1,0.1:2,0.01",
    "rex": "",
}
LOSSES = (
    *("l1", "l2"),
    *("huber --huber_c 0.2 --huber_scale 2", "huber --huber_schedule exponential"),
    *("smooth_l1", "smooth_l1 --huber_schedule constant", "smooth_l1 --huber_schedule snr"),
)
NOISES = (
    "--noise_offset 0.0357",
    "--noise_offset 0.0357 --noise_offset_random_strength --adaptive_noise_scale 0.01",
    "--multires_noise_iterations 6 --multires_noise_discount 0.3",
    "--ip_noise_gamma 0.1 --ip_noise_gamma_random_strength",
    "--zero_terminal_snr --v_parameterization",
    "--immiscible_noise",
)
TIMESTEPS = (
    "--min_timestep 200 --max_timestep 800",
    "--timestep_sampling logit-normal --logit_mean 0.5",
    "--timestep_sampling cosine",
    "--timestep_sampling sigmoid",
    "--timestep_sampling table --timestep_weights 1 2 1",
)
WEIGHTINGS = (
    "--min_snr_gamma 5",
    "--debiased_estimation_loss",
    "--v_parameterization --scale_v_pred_loss_like_noise_pred",
    "--v_pred_like_loss 0.5",
    "--p2_gamma 1",
)
NETWORKS = (
    "networks.lora --network_args conv_dim=2 conv_alpha=1 rank_dropout=0.1 module_dropout=0.1",
    "networks.lora --network_args loraplus_lr_ratio=16 loraplus_unet_lr_ratio=8",
    "networks.lora --network_dropout 0.1",
    f"networks.lora --network_args block_dims={','.join(['2'] * 23)}",
    "locon",
    "lokr",
    "lycoris.kohya --network_args algo=lora",
    "lycoris.kohya --network_args algo=locon conv_dim=2 conv_alpha=1 use_tucker=True",
    "lycoris.kohya --network_args algo=loha preset=attn-mlp",
    "lycoris.kohya --network_args algo=lokr preset=full",
)

COLUMNS = (
    [
        *(f"--optimizer_type {name}" for name in OPTIMIZERS),
        *("--optimizer_type Lion", "--optimizer_type CAME", "--use_8bit_adam"),
        *(f"--optimizer_type {name} --learning_rate 1" for name in ONE_RATE_OPTIMIZERS),
        *(f"--optimizer_type {name}" for name in OPTIMIZERS_OF_THEIR_OWN_SCHEDULE),
        "--lr_scheduler_type CosineAnnealingLR --use_lion_optimizer",
    ],
    [
        *(f"--network_module {name}" for name in NETWORKS),
        *(f"--lr_scheduler {name} {flags}" for name, flags in SCHEDULERS.items()),
    ],
    [*(f"--loss_type {name}" for name in LOSSES), *NOISES, *TIMESTEPS, *WEIGHTINGS],
)
CASES = [" ".join(row).strip() for row in itertools.zip_longest(*COLUMNS, fillvalue="")]
"""Each name once. A run costs a second, so one of each column share it."""


SPELLINGS = {
    *("network_args", "optimizer_args", "lr_scheduler_args"),
    *("use_8bit_adam", "use_lion_optimizer", "lr_scheduler_type"),
}
"""Options that are recorded as others."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photographs in a batch of their own size."""
    folder = tmp_path_factory.mktemp("images")
    for name in ("coffee.png", "rocket.jpg"):
        path = folder / "1_photo" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        with resources.files("skimage.data").joinpath(name).open("rb") as file:
            Image.open(file).convert("RGB").resize((64, 64)).save(path)
        path.with_suffix(".txt").write_text("a photograph", encoding="utf-8")
    return folder


def settings(model: Path, images: Path, output: Path) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": str(model),
        "train_data_dir": str(images),
        "output_dir": str(output),
        "output_name": "x",
        "resolution": 64,
        "train_batch_size": 2,
        "network_module": "networks.lora",
        "network_dim": 2,
        "learning_rate": 1e-3,
        "max_train_steps": 3,
        "seed": 1,
        "max_data_loader_n_workers": 0,
        "progress": False,
        "cache_latents": True,
        "cache_text_encoder_outputs": True,
        "network_train_unet_only": True,
    }


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("flags", CASES)
def test_each_name_of_the_guides_trains(
    flags: str, tiny_file: Path, images: Path, tmp_path: Path
) -> None:
    words = flags.split()
    chosen = settings(tiny_file, images, tmp_path)
    # A flag that is given twice would be remarked on.
    common = {name: value for name, value in chosen.items() if f"--{name}" not in words}
    argv = [word for name, value in common.items() for word in (f"--{name}", str(value))]
    assert main([*argv, *words]) == 0
    tensors = load_file(tmp_path / "x.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    record = json.loads((tmp_path / "x.run.json").read_text("utf-8"))
    assert record["results"]["steps"] == 3
    named = {word.removeprefix("--") for word in words if word.startswith("--")}
    used = {name.partition(".")[0] for name, o in record["options"].items() if is_given(o)}
    assert named - SPELLINGS <= used


def is_given(option: dict[str, Any]) -> bool:
    return bool(option["origin"] == "command line")


def test_the_command_of_the_sdxl_guide_trains(
    tiny_file: Path, images: Path, tmp_path: Path, start_command: StartCommand
) -> None:
    """Its rates of both text encoders contradict its cached outputs, so without the cache."""
    dataset = tmp_path / "my_sdxl_dataset_config.toml"
    dataset.write_text(
        f"""
[general]
enable_bucket = true
caption_extension = ".txt"

[[datasets]]
resolution = 64
batch_size = 2
min_bucket_reso = 64
bucket_reso_steps = 32

  [[datasets.subsets]]
  image_dir = '{images / "1_photo"}'
  num_repeats = 1
""",
        encoding="utf-8",
    )
    output = tmp_path / "out put"
    process = start_command(
        {
            "pretrained_model_name_or_path": str(tiny_file),
            "dataset_config": str(dataset),
            "output_dir": str(output),
            "output_name": "my_sdxl_lora",
            "save_model_as": "safetensors",
            "network_module": "networks.lora",
            "network_dim": 32,
            "network_alpha": 16,
            "learning_rate": 1e-4,
            "unet_lr": 1e-4,
            "text_encoder_lr1": 1e-5,
            "text_encoder_lr2": 1e-5,
            "optimizer_type": "AdamW8bit",
            "lr_scheduler": "constant",
            "max_train_epochs": 3,
            "save_every_n_epochs": 1,
            "mixed_precision": "bf16",
            "gradient_checkpointing": True,
            "cache_latents": True,
            "max_data_loader_n_workers": 0,
        }
    )
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert sorted(path.name for path in output.glob("*.safetensors")) == [
        "my_sdxl_lora-000001.safetensors",
        "my_sdxl_lora-000002.safetensors",
        "my_sdxl_lora.safetensors",
    ]
