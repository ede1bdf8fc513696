"""The settings of a run, read back from the metadata of its files: the inverse of ``record``."""

from __future__ import annotations

import ast
import json
import re
from typing import TYPE_CHECKING, Any

from sdxl_train.plugins import PluginHost
from sdxl_train.record import RECORDED_OPTIONS
from sdxl_train.registry import Registry
from sdxl_train.resolve import Resolver
from sdxl_train.settings import from_mapping

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_ALSO = {
    "ss_output_name": "output_name",
    "ss_training_comment": "training_comment",
    "ss_seed": "seed",
    "ss_max_train_steps": "max_train_steps",
    "ss_lr_warmup_steps": "lr_warmup_steps",
    "ss_lr_scheduler": "lr_scheduler",
    "ss_loss_type": "loss_type",
    "ss_network_module": "network_module",
    "ss_debiased_estimation": "debiased_estimation_loss",
    "ss_zero_terminal_snr": "zero_terminal_snr",
    "ss_batch_size_per_device": "train_batch_size",
    "ss_resolution": "resolution",
    "ss_color_aug": "color_aug",
    "ss_flip_aug": "flip_aug",
    "ss_random_crop": "random_crop",
    "ss_shuffle_caption": "shuffle_caption",
    "ss_enable_bucket": "enable_bucket",
    "ss_bucket_no_upscale": "bucket_no_upscale",
    "ss_min_bucket_reso": "min_bucket_reso",
    "ss_max_bucket_reso": "max_bucket_reso",
    "ss_keep_tokens": "keep_tokens",
}
"""Options that are recorded under another name, or not for every run."""

_SAYS_NOTHING = ("", "None", "False", "Dynamic")


def recorded_settings(metadata: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Give the settings of the run that wrote a file, as ``--config_file`` takes them.

    Where files and folders were is not recorded, so the base model, the data and the output folder
    are not among them.

    Args:
        metadata: That of the file, as sd-scripts and this program write it.

    Returns:
        The settings by option, and what was recorded but cannot be set here, with the reason.
    """
    settings = dict(_recorded(metadata))
    refused: dict[str, str] = {}
    while True:
        host = PluginHost()
        given = from_mapping(_written(settings))
        problems = Resolver(given, host, Registry(host)).resolve().problems
        wrong = {}
        for problem in problems:
            found = re.match(r"option (\w+)(?:[ .](\w+))?", problem.place)
            if found and found[1] in settings:
                wrong[found.groups()] = problem.message
        if not wrong:
            return _written(settings), refused
        for (name, key), message in wrong.items():
            table = settings[name]
            if isinstance(table, dict) and key in table:
                del table[key]
            else:
                del settings[name]
            refused[f"{name}.{key}" if key else name] = message


def _written(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Give tables of arguments as words: in those, a number may be written as a text."""
    return {
        name: [f"{key}={text}" for key, text in value.items()] if isinstance(value, dict) else value
        for name, value in settings.items()
    }


def _recorded(metadata: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    for name, idle in RECORDED_OPTIONS.items():
        text = metadata.get(f"ss_{name}", "None")
        if text not in (*_SAYS_NOTHING, str(idle)):
            yield name, _value(text)
    for key, name in _ALSO.items():
        text = metadata.get(key, "None")
        if text not in _SAYS_NOTHING:
            value = _value(text)
            yield name, ",".join(map(str, value)) if isinstance(value, (tuple, list)) else value
    if metadata.get("modelspec.prediction_type") == "v":
        yield "v_parameterization", True
    first, comma, last = metadata.get("modelspec.timestep_range", "").partition(",")
    if comma:
        yield "min_timestep", int(first)
        yield "max_timestep", int(last)
    yield from _network_args(metadata)
    yield from _optimizer(metadata.get("ss_optimizer", ""))


def _network_args(metadata: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    try:
        args = json.loads(metadata.get("ss_network_args", "{}"))
    except ValueError:
        return
    # Beside the arguments sd-scripts records the dropout, which has an option of its own.
    given = {name: str(text) for name, text in args.items() if name != "dropout"}
    if given:
        yield "network_args", given


def _optimizer(text: str) -> Iterator[tuple[str, Any]]:
    """Read ``torch.optim.adamw.AdamW(weight_decay=0.1,betas=0.9,0.99)``."""
    found = re.fullmatch(r"([\w.]+)(?:\((.*)\))?", text)
    if not found:
        return
    yield "optimizer_type", found[1].rpartition(".")[2]
    # A value may hold commas, so what parts arguments is a comma and the name of the next.
    words = re.split(r",\s*(?=[A-Za-z_]\w*=)", found[2] or "")
    args = dict(word.split("=", 1) for word in words if "=" in word)
    if args:
        yield "optimizer_args", args


def _value(text: str) -> Any:
    """Read a value of Python's notation; anything else is the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
