"""Which plugins are found, enabled and blocked."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from sdxl_train.errors import PluginError
from sdxl_train.loading import find_plugins
from sdxl_train.plugins import BUILTIN, PluginHost, PluginRequest

if TYPE_CHECKING:
    from pathlib import Path

    from sdxl_train.errors import Problem
    from tests.core.conftest import Command, Site


def _applied(*requests: str) -> tuple[PluginHost, list[str]]:
    host = PluginHost()
    problems: list[Problem] = []
    host.apply([(request, "--plugin") for request in requests], problems)
    return host, [str(problem) for problem in problems]


def test_plugins_are_found_in_order_of_name_without_import(site: Site) -> None:
    for name in ("zeta", "alpha", "mid"):
        site.add(name, "raise RuntimeError('imported')")

    names = [plugin.name for plugin in find_plugins()]

    assert names == sorted(names)
    assert {"alpha", "mid", "zeta", BUILTIN} <= set(names)


def test_builtin_is_on_unless_blocked(site: Site) -> None:
    site.add("grain")

    assert list(_applied()[0].enabled) == [BUILTIN]
    assert list(_applied("no:sdxl-lora")[0].enabled) == []
    assert list(_applied("grain", "no:SDXL_LoRA")[0].enabled) == ["grain"]


def test_a_block_acts_first_wherever_it_stands(site: Site) -> None:
    site.add("loud", "raise RuntimeError('imported')")

    host, problems = _applied("loud", "no:loud")

    assert problems == []
    assert "loud" not in host.enabled
    with pytest.raises(PluginError, match=r"plugin 'loud' is blocked by no:loud"):
        host.enable("loud")


def test_blocking_an_unknown_plugin_names_the_nearest(site: Site) -> None:
    site.add("grain")

    assert _applied("no:gran")[1] == [
        "--plugin: no plugin 'gran' is installed; did you mean grain?"
    ]


def test_misspelt_plugin_names_the_nearest(site: Site) -> None:
    site.add("grain")

    assert _applied("grian")[1] == ["--plugin: no plugin 'grian' is installed; did you mean grain?"]


def test_the_name_of_a_distribution_leads_to_its_plugin(site: Site) -> None:
    site.add("grain", distribution="sdxl-train-film")

    (problem,) = _applied("sdxl_train_film")[1]

    assert "the plugin of sdxl_train_film is 'grain'" in problem


def test_case_and_separators_of_a_plugin_name_do_not_matter(site: Site) -> None:
    site.add("film-grain")

    host, problems = _applied("Film_Grain")

    assert problems == []
    assert "film-grain" in host.enabled


def test_one_name_in_two_distributions_is_an_error_when_named(site: Site) -> None:
    site.add("grain", distribution="film")
    site.add("grain", distribution="sand", version="2.1")

    (problem,) = _applied("grain")[1]

    assert "more than one plugin is called 'grain': film 1.0 and sand 2.1" in problem


def test_one_name_in_two_distributions_is_a_warning_otherwise(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.add("grain", distribution="film")
    site.add("grain", distribution="sand")
    host, problems = _applied()

    assert problems == []
    host.load_rest()
    host.load_rest()

    (warning,) = [record.getMessage() for record in caplog.records if "grain" in record.message]
    assert "film 1.0 and sand 1.0" in warning
    assert [host.state(plugin) for plugin in host.found if plugin.name == "grain"] == [
        "ambiguous",
        "ambiguous",
    ]


def test_nobody_takes_the_name_of_the_builtin_plugin_in_silence(site: Site) -> None:
    site.add(BUILTIN, distribution="impostor")

    host, (problem,) = _applied()

    assert "impostor 1.0" in problem
    assert "sdxl-train" in problem
    assert host.enabled == {}


def test_version_range_is_held(site: Site) -> None:
    site.add("grain", version="1.4")

    assert "grain" in _applied("grain>=1.2,<2")[0].enabled
    assert _applied("grain>=2")[1] == [
        "--plugin: plugin 'grain': installed is grain-dist 1.4, the run wants >=2"
    ]


@pytest.mark.parametrize("text", ["", "no:", "grain>=", "a b", "no:grain>=2", "-grain"])
def test_what_is_no_plugin_request_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not"):
        PluginRequest.parse(text)


def test_a_file_is_a_plugin_when_its_path_is_given(site: Site, tmp_path: Path) -> None:
    file = tmp_path / "my_grain.py"
    file.write_text(site.noise, encoding="utf-8")

    host, problems = _applied(str(file), str(file))

    assert problems == []
    plugin = host.enabled["my-grain"]
    assert list(plugin.components["noise"]) == ["grain"]
    assert str(plugin.found) == f"'my-grain' ({file})"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (problem,) = _applied(str(tmp_path / "gone.py"))[1]

    assert problem == f"--plugin: plugin file {tmp_path / 'gone.py'} does not exist"


def test_a_file_does_not_replace_an_installed_plugin(site: Site, tmp_path: Path) -> None:
    site.add("grain")
    file = tmp_path / "grain.py"
    file.write_text(site.noise, encoding="utf-8")

    (problem,) = _applied("grain", str(file))[1]

    assert f"grain-dist 1.0 and {file}" in problem


def test_a_file_may_be_blocked_by_name(tmp_path: Path) -> None:
    file = tmp_path / "loud.py"
    file.write_text("raise RuntimeError('imported')", encoding="utf-8")

    host, problems = _applied(str(file), "no:loud")

    assert "loud" not in host.enabled
    assert len(problems) == 1  # nothing of this name is installed to be blocked


def test_nothing_is_picked_up_from_the_current_folder(
    site: Site, command: Command, tmp_path: Path
) -> None:
    here = type(site)(tmp_path / "downloaded")
    here.path.mkdir()
    here.add("evil", "open('imported', 'w').close()")
    (here.path / "packaging.py").write_text("open('imported', 'w').close()", encoding="utf-8")

    done = command("plugins", cwd=here.path)

    assert done.returncode == 0, done.stderr
    assert "evil" not in done.stdout
    assert not (here.path / "imported").exists()


def test_a_distribution_without_metadata_harms_nobody(site: Site) -> None:
    site.add("grain")
    site.add("ghost")
    next(site.path.glob("ghost*.dist-info/METADATA")).unlink()

    host, problems = _applied("grain")

    assert problems == []
    assert "'ghost' (a distribution without metadata" in " ".join(map(str, host.found))


def test_enabling_twice_registers_once(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    site.add("grain")
    host, _ = _applied("grain", "grain")

    assert host.enable("grain") is host.enabled["grain"]
    assert len([name for name, _ in host.manager.list_name_plugin() if name == "grain"]) == 1
