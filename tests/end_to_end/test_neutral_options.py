"""Every option that a resumed run may set otherwise leaves the weights as they are, bit for bit.

All of them are changed in one run; whoever adds one to the list must say here what it is set to, or
why it cannot be neutral by itself.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from sdxl_lora_plugins.model import Sdxl
from sdxl_train.components import Network
from sdxl_train.config import CORE_OPTIONS
from sdxl_train.engine_options import EngineOptions
from sdxl_train.metadata_options import MetadataOptions
from sdxl_train.plugins import PluginHost
from sdxl_train.registry import Registry
from sdxl_train.resolve import Resolver
from sdxl_train.resume import MAY_CHANGE, shaping_options
from sdxl_train.settings import from_mapping

if TYPE_CHECKING:
    from pathlib import Path

    from tests.end_to_end.conftest import MakeOptions, SameTensors, TrainLora

BASE: dict[str, Any] = {
    "network_train_unet_only": True,
    "validation_split": 0.3,
    "validate_every_n_epochs": 0,
    "max_train_steps": 3,
    "save_state_on_train_end": True,
    "plugin": None,
}

NEUTRAL: dict[str, Any] = {
    "output_name": "other",
    "save_model_as": "pt",
    "save_precision": "fp16",
    "save_every_n_epochs": 1,
    "save_every_n_steps": 1,
    "save_last_n_epochs": 1,
    "save_last_n_steps": 1,
    "save_state": True,
    "save_last_n_epochs_state": 1,
    "save_last_n_steps_state": 2,
    "save_state_every_n_epochs": 1,
    "save_state_every_n_steps": 1,
    "overwrite": True,
    "training_comment": "neutral",
    "metadata_title": "neutral",
    "no_metadata": True,
    "strict_observers": True,
    "observer_timeout": 500,
    "observer": ["progress"],
    "validate_every_n_steps": 1,
    "validate_every_n_epochs": 1,
    "max_validation_steps": 1,
    "early_stop_patience": 50,
    "save_best": True,
    "skip_until_initial_step": True,
    "device": "cpu",
    "on_bad_image": "skip",
    "strict_captions": True,
    "cache_info": True,
    "cache_latents": True,
    "cache_latents_to_disk": True,
    "cache_text_encoder_outputs": True,
    "cache_text_encoder_outputs_to_disk": True,
    "skip_cache_check": True,
    "max_data_loader_n_workers": 2,
    "persistent_data_loader_workers": True,
    "check_late": False,
    "pin_memory": False,
    "lowram": True,
    "highvram": False,
    "disable_mmap_load_safetensors": True,
}

ELSEWHERE = {
    "train_data_dir": "moved in this test",
    "pretrained_model_name_or_path": "moved in this test",
    "output_dir": "moved in this test",
    "tokenizer_cache_dir": "moved in this test",
    "reg_data_dir": "its images are compared by digest",
    "dataset_config": "its images are compared by digest",
    "in_json": "its images are compared by digest",
    "config_file": "its options are compared one by one",
    "output_config": "trains nothing",
    "ddp_timeout": "says how long processes wait: docs/distributed.md",
    "ddp_gradient_as_bucket_view": "how gradients travel: test_exchange.py",
    "ddp_static_graph": "how gradients travel: test_exchange.py",
    "train_batch_size": "compared as its product with the processes: test_two_processes_fail.py",
    "debug_dataset": "trains nothing",
    "plugin": "what takes part is compared by name and version",
    "resume": "test_resume.py",
    "max_train_steps": "totals: test_resume.py",
    "max_train_epochs": "totals: test_resume.py",
    "save_n_epoch_ratio": "another word for save_every_n_epochs",
    "save_state_on_train_end": "on in both runs; test_resume.py",
    "initial_step": "test_failures.py",
    "initial_epoch": "test_failures.py",
    "reset_optimizer": "test_failures.py",
    "drop_plugin_state": "test_bad_inputs_states.py",
    "allow_base_change": "another base model is compared by its hash",
    "seed": "compared apart",
    "console_log_level": "says more or less of the same",
    "console_log_simple": "says the same otherwise",
    "console_log_file": "says the same elsewhere",
    "vae": "another one is compared by its hash",
    "network_weights": "a state has weights of its own",
    "base_weights": "what is merged is compared with the model",
    "cpu_offload_checkpointing": "with gradient_checkpointing: test_model_memory.py",
    **dict.fromkeys(EngineOptions.model_fields, "several processes: test_engines.py"),
}


def test_everything_neutral_at_once_changes_no_weight(
    train_lora: TrainLora,
    same_tensors: SameTensors,
    photographs: Path,
    tiny_file: Path,
    tmp_path: Path,
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --s 1 --w 64 --h 64\n", encoding="utf-8")
    model = shutil.copy(tiny_file, tmp_path / "elsewhere.safetensors")
    plain = train_lora(**BASE)
    busy = train_lora(
        **{
            **BASE,
            **NEUTRAL,
            "train_data_dir": str(shutil.copytree(photographs, tmp_path / "data")),
            "pretrained_model_name_or_path": str(model),
            "tokenizer_cache_dir": str(tmp_path / "tokenizers"),
            "progress": True,
            "sample_prompts": str(prompts),
            "sample_every_n_steps": 1,
        }
    )
    before = load_file(plain.folder / "photo-state" / "parameters.safetensors")
    after = load_file(busy.folder / "other-state" / "parameters.safetensors")
    assert same_tensors(before, after)


def test_every_option_that_may_change_is_tried() -> None:
    claimed = MAY_CHANGE | Sdxl.may_change | Network.may_change
    described = {name for name in MetadataOptions.model_fields if name.startswith("metadata_")}
    assert claimed - described == (NEUTRAL.keys() | ELSEWHERE.keys()) - described
    assert not NEUTRAL.keys() & ELSEWHERE.keys()


def test_every_other_option_is_compared(options: MakeOptions) -> None:
    """The args are compared key by key; stacked components by their own options."""
    other_words = ("use_8bit_adam", "use_lion_optimizer", "lr_scheduler_type")
    host = PluginHost()
    settings = from_mapping(options(plugin=None))
    resolution = Resolver(settings, host, Registry(host)).resolve()
    assert resolution.problems == []
    assert resolution.config is not None
    compared = shaping_options(resolution.config)
    for model in CORE_OPTIONS:
        for name in model.model_fields:
            by_parts = name.endswith("_args") or name in ("noise", "weighting", *other_words)
            assert (name in compared) != (name in MAY_CHANGE) or by_parts, name


def test_what_is_not_neutral_would_be_noticed(
    train_lora: TrainLora, same_tensors: SameTensors
) -> None:
    first, second = (
        train_lora(**{**BASE, "max_train_steps": 1, "seed": seed}).folder for seed in (1, 2)
    )
    one, two = (
        load_file(folder / "photo-state" / "parameters.safetensors") for folder in (first, second)
    )
    assert not same_tensors(one, two)
