"""LoRA on the full-size SDXL, on the meta device: keys, shapes and groups of sd-scripts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdxl_lora_plugins.networks import Lora

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdxl_train.assembly import Assembly


def test_keys_shapes_and_alphas_equal_the_golden_file(
    attach_full_size: Callable[..., Assembly], golden: Callable[[str], Any]
) -> None:
    state = attach_full_size(Lora(network_dim=4)).adapter.state_dict()
    found = {name: {"shape": list(tensor.shape)} for name, tensor in state.items()}
    expected = golden("keys_lora_dim4")
    assert found == {name: {"shape": entry["shape"]} for name, entry in expected.items()}
    alphas = {name: t.item() for name, t in state.items() if name.endswith(".alpha")}
    assert alphas == {n: entry["value"] for n, entry in expected.items() if n.endswith(".alpha")}


def test_parts_have_the_known_numbers_of_modules(attach_full_size: Callable[..., Assembly]) -> None:
    parts = attach_full_size(Lora(network_dim=4)).parts
    assert {name: part.modules for name, part in parts.items()} == {
        "te1": 72,
        "te2": 192,
        "unet": 722,
    }
    # Parameters for each unit of rank, as counted on sd-scripts' network.
    assert {name: part.parameters // 4 for name, part in parts.items()} == {
        "te1": 165_888,
        "te2": 737_280,
        "unet": 2_659_840,
    }


def groups_of(assembly: Assembly) -> dict[str, tuple[float, int]]:
    return {group["name"]: (group["lr"], len(group["params"])) for group in assembly.groups}


def test_two_text_encoder_rates_make_two_groups(attach_full_size: Callable[..., Assembly]) -> None:
    expected = {
        "unet": (2e-4, 1444),
        "textencoder te1": (5e-5, 144),
        "textencoder te2": (1e-5, 384),
    }
    assert (
        groups_of(attach_full_size(Lora(network_dim=4), unet_lr=2e-4, text_encoder_lr=[5e-5, 1e-5]))
        == expected
    )
    rates = {"text_encoder_lr1": 5e-5, "text_encoder_lr2": 1e-5}
    assert groups_of(attach_full_size(Lora(network_dim=4), unet_lr=2e-4, **rates)) == expected


def test_text_encoder_at_rate_0_has_no_keys(attach_full_size: Callable[..., Assembly]) -> None:
    assembly = attach_full_size(Lora(network_dim=4), unet_lr=2e-4, text_encoder_lr=[0, 1e-5])
    assert groups_of(assembly) == {"unet": (2e-4, 1444), "textencoder": (1e-5, 384)}
    assert not [name for name in assembly.adapter.state_dict() if name.startswith("lora_te1")]
    assert assembly.parts["te1"].modules == 0
