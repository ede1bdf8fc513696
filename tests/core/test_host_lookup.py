"""Every name resolves to exactly one component, or the error names the candidates."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
import torch

from sdxl_train.plugins import PluginError, PluginHost
from sdxl_train.registry import KIND_BY_NAME, Registry

if TYPE_CHECKING:
    from pathlib import Path

    from sdxl_train.errors import Problem
    from sdxl_train.registry import Entry
    from tests.core.conftest import Command, Resolve, Site


def _registry(*plugins: str) -> Registry:
    host = PluginHost()
    problems: list[Problem] = []
    host.apply([(name, "--plugin") for name in plugins], problems)
    assert problems == []
    return Registry(host)


def _find(registry: Registry, name: str, kind: str = "loss") -> Entry:
    return registry.find(KIND_BY_NAME[kind], name)


def _message(registry: Registry, name: str, kind: str = "loss") -> str:
    with pytest.raises(PluginError) as caught:
        _find(registry, name, kind)
    return str(caught.value)


def test_names_are_found_whatever_their_case() -> None:
    registry = _registry()

    assert _find(registry, "adamw", "optimizer").name == "AdamW"
    assert _find(registry, "L2").name == "l2"


def test_case_distinguishes_two_names_of_one_plugin(site: Site) -> None:
    code = site.loss.replace('"absolute": Absolute', '"abs": Absolute, "Abs": Absolute')
    site.add("shout", code)

    assert _find(_registry("shout"), "Abs").name == "Abs"


def test_a_bare_name_of_one_installed_plugin_enables_it_and_says_so(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sdxl_train")
    site.add("robust", site.loss)
    registry = _registry()

    entry = _find(registry, "absolute")

    assert entry.qualified == "robust:absolute"
    assert "robust" in registry.host.enabled
    assert "plugin 'robust' (robust-dist 1.0) enabled: it provides loss absolute" in caplog.messages


def test_two_plugins_with_one_name_are_told_apart_by_the_qualified_name(site: Site) -> None:
    site.add("robust", site.loss)
    site.add("sturdy", site.loss)

    for registry in (_registry(), _registry("robust", "sturdy")):
        assert _message(registry, "absolute") == (
            "2 plugins provide the loss 'absolute'; write robust:absolute or sturdy:absolute"
        )
        assert _find(registry, "sturdy:absolute").plugin == "sturdy"


def test_a_plugin_does_not_shadow_a_builtin_component(site: Site) -> None:
    site.add("other", site.loss.replace('"absolute"', '"L2"'))

    assert _find(_registry(), "l2").plugin == "sdxl-lora"
    assert _message(_registry("other"), "l2") == (
        "2 plugins provide the loss 'l2'; write sdxl-lora:l2 or other:L2"
    )


def test_a_qualified_name_enables_its_plugin(site: Site) -> None:
    site.add("robust", site.loss)
    registry = _registry()

    assert _find(registry, "robust:absolute").plugin == "robust"
    assert "robust" in registry.host.enabled


def test_a_qualified_name_says_what_is_wrong_with_it(site: Site) -> None:
    site.add("robust", site.loss)
    site.add("grain")
    registry = _registry()

    assert "no plugin 'robst' is installed; did you mean robust?" in _message(registry, "robst:x")
    assert "plugin 'robust' has no loss 'absolut'; did you mean absolute?" in _message(
        registry, "robust:absolut"
    )
    assert "it provides none of kind loss" in _message(registry, "grain:l2")


def test_a_component_of_a_blocked_plugin_is_not_found(site: Site) -> None:
    site.add("robust", site.loss)
    registry = _registry("no:robust")

    assert "no loss is called 'absolute'" in _message(registry, "absolute")
    assert "plugin 'robust' is blocked by no:robust" in _message(registry, "robust:absolute")


def test_an_unknown_name_suggests_one_and_tells_who_was_not_asked(site: Site) -> None:
    site.add("robust", site.loss)
    site.add("bad", "raise RuntimeError")

    text = _message(_registry(), "absolut")

    assert "no loss is called 'absolut'; did you mean absolute?" in text
    assert "plugins that do not load were not asked: 'bad'" in text


def test_a_dotted_path_loads_the_component_that_the_user_names(site: Site) -> None:
    (site.path / "my_losses.py").write_text(site.loss, encoding="utf-8")

    entry = _find(_registry(), "my_losses.Absolute")

    assert entry.component.__name__ == "Absolute"


def test_a_dotted_path_to_something_else_is_refused(site: Site) -> None:
    (site.path / "my_things.py").write_text(
        "from sdxl_train import Loss\nclass Half(Loss):\n    pass\nimport no_such_library\n",
        encoding="utf-8",
    )
    registry = _registry()

    assert "collections.OrderedDict is not a subclass of sdxl_train.Loss" in _message(
        registry, "collections.OrderedDict"
    )
    assert "No module named 'no_such_library'" in _message(registry, "my_things.Half")
    assert "did you mean networks.lora?" in _message(registry, "networks.lorra", "network")


def test_a_dotted_path_to_an_abstract_component_is_refused() -> None:
    assert "sdxl_train.Loss cannot serve as loss: Loss lacks build" in _message(
        _registry(), "sdxl_train.Loss"
    )


def test_a_flag_activates_the_stacked_component_of_a_file(
    site: Site, resolve: Resolve, tmp_path: Path
) -> None:
    file = tmp_path / "grainy.py"
    file.write_text(site.noise, encoding="utf-8")

    idle = resolve("--plugin", str(file))
    active = resolve("--plugin", str(file), "--grain", "0.5")

    assert idle.config is not None
    assert active.config is not None
    assert idle.config.noises == ()
    (noise,) = active.config.noises
    assert noise.model_dump() == {"grain": 0.5}


def test_the_command_enables_and_logs_the_plugin_of_a_bare_name(
    site: Site, command: Command
) -> None:
    site.add("robust", site.loss)

    done = command("components", "loss:absolute", "--json")

    assert done.returncode == 0, done.stderr
    assert '"plugin": "robust"' in done.stdout
    assert "plugin 'robust' (robust-dist 1.0) enabled" in done.stderr


CHANNEL_OFFSET = '''
"""Noise with a random offset for each channel."""
import torch
from sdxl_train import Field, Noise, hookimpl

class ChannelOffset(Noise):
    """Noise with a random offset for each channel."""
    channel_offset: float | None = Field(None, ge=0, description="Standard deviation of the offset.")

    def build(self, schedule):
        def transform(noise, latents, timesteps, generator):
            b, c, *_ = noise.shape
            return noise + self.channel_offset * torch.randn(b, c, 1, 1, generator=generator, device=noise.device)
        return transform

@hookimpl
def register_noises():
    return {"channel-offset": ChannelOffset}
'''  # noqa: E501


def test_the_smallest_plugin_is_found_installed_or_as_a_file(
    site: Site, resolve: Resolve, tmp_path: Path
) -> None:
    file = tmp_path / "my_offset.py"
    file.write_text(CHANNEL_OFFSET, encoding="utf-8")
    site.add("offset", CHANNEL_OFFSET)

    for plugin in (str(file), "offset"):
        resolution = resolve("--plugin", plugin, "--channel_offset", "0.05")

        assert resolution.problems == []
        assert resolution.config is not None
        (noise,) = resolution.config.noises
        transform = noise.build(None)  # type: ignore[arg-type]
        still = torch.zeros(2, 4, 3, 3)
        moved = transform(still, still, still, torch.Generator().manual_seed(7))
        drawn = torch.randn(2, 4, 1, 1, generator=torch.Generator().manual_seed(7))
        torch.testing.assert_close(moved, (0.05 * drawn).expand(2, 4, 3, 3))
