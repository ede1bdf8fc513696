"""Optimizer groups on the full-size SDXL, held against sd-scripts' and LyCORIS's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from sdxl_lora_plugins.networks import Lora
from sdxl_train_lycoris.networks import Kohya

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdxl_train.assembly import Assembly

OF_NETWORK = ("loraplus", "down_lr", "mid_lr", "up_lr")


def expected_groups(row: dict[str, Any]) -> dict[str, tuple[Any, int]]:
    """Rate and tensors by name. The peer gives both encoders the first of two rates; we both."""
    groups = {g["desc"]: (pytest.approx(g["lr"]), g["tensors"]) for g in row["groups"]}
    rates = row["args"]["text_encoder_lr"]
    if isinstance(rates, list) and len(rates) == 2:
        (encoders,) = [g for g in row["groups"] if g["desc"] == "textencoder"]
        del groups["textencoder"]
        for part, rate in zip(("te1", "te2"), rates, strict=True):
            groups[f"textencoder {part}"] = (pytest.approx(rate), encoders[part])
    return groups


@pytest.mark.parametrize("module", ["networks.lora", "lycoris.kohya"])
def test_groups_equal_the_golden_ones(
    module: str, attach_full_size: Callable[..., Assembly], golden: Callable[[str], Any]
) -> None:
    checked = 0
    for row in golden("param_groups"):
        args = dict(row["args"])
        # Without any rate the peer trains nothing; here the rate has a default.
        if row["module"] != module or args["learning_rate"] is None:
            continue
        text = args.pop("text_encoder_lr")
        own = {name: args.pop(name) for name in list(args) if name.startswith(OF_NETWORK)}
        own |= {name: float(value) for name, value in own.items() if name.startswith("loraplus")}
        if args.pop("train_te", True) is False:
            args["network_train_unet_only"] = True
        args.pop("train_unet", None)
        if module == "lycoris.kohya" and not own and "train_te" not in row["args"]:
            continue  # the rows with LoRA+ hold these groups and more; each network takes seconds
        if text is not None:
            args["text_encoder_lr"] = text if isinstance(text, list) else [text]
        network: Any = Lora(network_dim=4, **own)
        if module == "lycoris.kohya":
            network = Kohya(network_dim=4, preset="attn-mlp", **own)
        with torch.device("meta"):
            groups = attach_full_size(network, **args).groups
        found = {group["name"]: (group["lr"], len(group["params"])) for group in groups}
        assert found == expected_groups(row), row["args"]
        checked += 1
    assert checked == {"networks.lora": 18, "lycoris.kohya": 9}[module]
