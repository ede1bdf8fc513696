"""Networks as diffusers' ``load_lora_weights`` wants them: its names, and peft's configuration."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

from sdxl_train.errors import UserError
from sdxl_train.ldm.files.network_file import ADAPTER_METADATA, NetworkFile

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from sdxl_train.ldm.family import Family
    from sdxl_train.ldm.files.layers import Layer


def for_diffusers(
    tensors: Mapping[str, Tensor], family: Family
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Name the tensors of a network as diffusers does; alpha / rank is multiplied in.

    Args:
        tensors: By kohya's names, on any device, the meta device too.
        family: What the network is for.

    Returns:
        The tensors in their dtype, and the metadata that tells their ranks.

    Raises:
        UserError: If it has other deltas than those of plain LoRA.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    file = NetworkFile.of_shapes(shapes, family)
    others = [
        module
        for module in file.modules.values()
        if module.algorithm != "lora"
        or not module.shapes.keys() <= {"lora_down.weight", "lora_up.weight", "alpha"}
    ]
    if others:
        titles = " and ".join(sorted({module.title for module in others}))
        raise UserError.of(
            "network",
            f"diffusers loads nothing but plain LoRA for {family.title}, and {len(others)} layers "
            f"are {titles}",
            "save as safetensors; `sdxl-train convert --to diffusers` makes a LoRA of it",
        )
    named: dict[str, Tensor] = {}
    ranks: dict[Layer, int] = {}
    for module in file.modules.values():
        down, up, alpha = (
            tensors[module.keys[name]] for name in ("lora_down.weight", "lora_up.weight", "alpha")
        )
        ranks[module.layer] = len(down)
        name = module.layer.name("diffusers")
        scaled = up * (alpha.float() / len(down)).to(up.device)
        named |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": scaled.to(up.dtype)}
    return named, {ADAPTER_METADATA: adapter_metadata(ranks)}


def adapter_metadata(ranks: Mapping[Layer, int]) -> str:
    """Give peft's configuration of each part as diffusers keeps it; every alpha is the rank."""
    content: dict[str, object] = {}
    prefixes = {layer.part: layer.name("diffusers").partition(".")[0] for layer in ranks}
    for part, prefix in prefixes.items():
        # transformers 5.6 dropped the first level of text encoder 1, and diffusers takes it off
        # from the tensors' names only; peft finds a path without it in either.
        own = {
            layer.diffusers_path.removeprefix("text_model."): rank
            for layer, rank in ranks.items()
            if layer.part == part
        }
        common = Counter(own.values()).most_common(1)[0][0]
        others = {path: rank for path, rank in own.items() if rank != common}
        content |= {
            f"{prefix}.r": common,
            f"{prefix}.lora_alpha": common,
            f"{prefix}.rank_pattern": others,
            f"{prefix}.alpha_pattern": others,
            f"{prefix}.target_modules": sorted(own),
        }
    return json.dumps(content, sort_keys=True)
