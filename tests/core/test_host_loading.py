"""Every way in which a plugin can be wrong is told with its name, and harms no other."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from sdxl_train import __version__, hookspecs
from sdxl_train.plugins import PluginError, PluginHost

if TYPE_CHECKING:
    from tests.core.conftest import Command, Resolve, Site

BROKEN = {
    "import": ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
    "syntax": ("def (:", "SyntaxError: invalid syntax"),
    "exit": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "raise": ("raise RuntimeError('boom')", "RuntimeError: boom"),
}

HEAD = "from sdxl_train import Field, Loss, Noise, hookimpl\n"


def _failure(site: Site, code: str, target: str | None = None) -> str:
    site.add("bad", code, target=target)
    with pytest.raises(PluginError) as caught:
        PluginHost().enable("bad")
    text = str(caught.value)
    assert text.startswith("plugin 'bad' (bad-dist 1.0)")
    return text


@pytest.mark.parametrize("case", BROKEN)
def test_a_plugin_that_fails_at_import_is_blamed_with_its_cause(site: Site, case: str) -> None:
    code, cause = BROKEN[case]

    text = _failure(site, code)

    assert "does not load (entry point bad = bad_dist_module)" in text
    assert cause in text


def test_an_entry_point_to_a_missing_attribute_is_named(site: Site) -> None:
    text = _failure(site, "x = 1", target="bad_dist_module:plugin")

    assert "entry point bad = bad_dist_module:plugin" in text
    assert "AttributeError: module 'bad_dist_module' has no attribute 'plugin'" in text


def test_an_entry_point_to_a_missing_module_is_named(site: Site) -> None:
    site.add("bad", None)

    with pytest.raises(PluginError, match="No module named 'bad_dist_module'"):
        PluginHost().load("bad")


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_one_warning_and_harms_no_other(
    site: Site, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    site.add("bad", BROKEN[case][0])
    site.add("grain")
    host = PluginHost()
    host.apply([], [])

    names = [plugin.name for plugin in host.load_rest()]
    host.load_rest()

    assert "grain" in names
    (warning,) = [record.getMessage() for record in caplog.records if "bad" in record.message]
    assert warning.startswith("plugin 'bad' (bad-dist 1.0) does not load (entry point bad = ")
    assert BROKEN[case][1] in warning


@pytest.mark.parametrize("case", BROKEN)
def test_a_run_that_does_not_use_a_broken_plugin_works(
    site: Site, resolve: Resolve, case: str
) -> None:
    site.add("bad", BROKEN[case][0])
    site.add("grain")

    resolution = resolve("--plugin", "grain", "--grain", "0.1")

    assert resolution.problems == []
    assert resolution.config is not None


def test_a_run_that_names_a_broken_plugin_lists_it_among_its_mistakes(
    site: Site, command: Command
) -> None:
    site.add("bad", "import no_such_library")

    done = command("--plugin", "bad", "--output_dir", "out", "--max_train_steps", "0")

    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "--plugin: plugin 'bad' (bad-dist 1.0) does not load" in done.stderr
    assert "No module named 'no_such_library'" in done.stderr
    assert "--max_train_steps: '0' is not a whole number >= 1" in done.stderr


def test_help_and_plugins_work_beside_broken_plugins(site: Site, command: Command) -> None:
    for name, (code, _) in BROKEN.items():
        site.add(f"bad-{name}", code)

    assert command("--help").returncode == 0
    listed = command("plugins")

    assert listed.returncode == 0
    assert all(f"bad-{name}" in listed.stdout for name in BROKEN)


def test_help_works_even_for_a_broken_plugin_that_is_named(site: Site, command: Command) -> None:
    site.add("bad", "raise RuntimeError('boom')")

    done = command("--plugin", "bad", "--help")

    assert done.returncode == 0
    assert "--learning_rate" in done.stdout
    assert "plugin 'bad' (bad-dist 1.0) does not load" in done.stderr


def test_what_a_plugin_prints_stays_out_of_json(site: Site, command: Command) -> None:
    site.add("loud", f"print('hello')\n{site.noise}")

    done = command("plugins", "loud", "--json")

    assert done.stdout.startswith("[")
    assert "hello" in done.stderr


def test_a_misspelt_hook_names_the_nearest(site: Site) -> None:
    text = _failure(site, f"{HEAD}\n@hookimpl\ndef register_noise():\n    return {{}}\n")

    assert "there is no hook 'register_noise'; did you mean register_noises?" in text


def test_a_hook_of_another_version_may_be_marked_optional(site: Site) -> None:
    site.add("new", f"{site.noise}\n@hookimpl(optionalhook=True)\ndef someday():\n    pass\n")

    assert PluginHost().enable("new").name == "new"


def test_an_argument_with_a_default_is_refused(site: Site) -> None:
    text = _failure(site, f"{HEAD}\n@hookimpl\ndef step_finished(run, step=None):\n    pass\n")

    assert "argument 'step' of step_finished has a default and would never be passed" in text


def test_an_unknown_argument_names_those_that_the_hook_offers(site: Site) -> None:
    text = _failure(site, f"{HEAD}\n@hookimpl\ndef step_finished(run, loss):\n    pass\n")

    assert "hook step_finished has no argument 'loss'; it offers run, step" in text


def test_starred_arguments_are_refused(site: Site) -> None:
    text = _failure(site, f"{HEAD}\n@hookimpl\ndef step_finished(**all):\n    pass\n")

    assert "argument 'all' of step_finished must be a plain one" in text


def test_a_forgotten_marker_is_an_error(site: Site) -> None:
    text = _failure(site, f"{HEAD}\ndef register_noises():\n    return {{}}\n")

    assert "register_noises has the name of a hook but no @hookimpl before it" in text


def test_a_module_without_hooks_is_no_plugin(site: Site) -> None:
    text = _failure(site, "x = 1")

    assert "bad_dist_module has no function marked with @hookimpl" in text


@pytest.mark.parametrize("mark", ["wrapper=True", "hookwrapper=True"])
def test_hook_wrappers_are_refused(site: Site, mark: str) -> None:
    code = f"{HEAD}\n@hookimpl({mark})\ndef register_noises():\n    yield\n"

    assert "register_noises is a hook wrapper" in _failure(site, code)


def test_a_plugin_object_with_eq_and_no_hash_works(site: Site) -> None:
    code = f"""{HEAD}
from dataclasses import dataclass

class Nothing(Loss):
    def build(self, schedule): ...

@dataclass
class Plugin:
    name: str = "x"

    @hookimpl
    def register_losses(self):
        return {{"nothing": Nothing}}

    @hookimpl
    def run_started(self, run):
        pass

plugin = Plugin()
"""
    site.add("data", code, target="data_dist_module:plugin")
    host = PluginHost()

    plugin = host.enable("data")

    assert list(plugin.components["loss"]) == ["nothing"]
    assert len(host.manager.get_plugins()) == 1
    assert plugin.module == "data_dist_module"


RETURNS = {
    "[]": "register_losses returned list, expected a dict of name -> subclass of Loss",
    "None": "register_losses returned NoneType, expected a dict",
    "{'l': Grain}": "expected a dict of name -> subclass of Loss",
    "{'l': Fine()}": "expected a dict of name -> subclass of Loss",
    "{'': Fine}": "expected a dict of name -> subclass of Loss",
    "{'a:b': Fine}": "expected a dict of name -> subclass of Loss",
    "{1: Fine}": "expected a dict of name -> subclass of Loss",
    "{'l': Abstract}": "Abstract lacks build",
    "1 / 0": "register_losses failed: ZeroDivisionError: division by zero",
    "{'l': Puzzle}": "the options of Puzzle cannot be read",
    "{'l': Undescribed}": "the options of Undescribed cannot be read",
}


@pytest.mark.parametrize("returned", RETURNS)
def test_a_wrong_answer_of_a_hook_is_told_with_what_was_expected(site: Site, returned: str) -> None:
    code = f"""{HEAD}
from collections.abc import Callable

class Fine(Loss):
    def build(self, schedule): ...

class Grain(Noise):
    def build(self, schedule): ...

class Abstract(Loss):
    pass

class Puzzle(Loss):
    size: "NotImported | None" = None
    def build(self, schedule): ...

class Undescribed(Loss):
    function: Callable[[int], int] | None = None
    def build(self, schedule): ...

@hookimpl
def register_losses():
    return {returned}
"""
    assert RETURNS[returned] in _failure(site, code)


@pytest.mark.parametrize("wanted", ["<0.1", ">=7,<8", "==0.0.1"])
def test_a_plugin_for_another_version_is_refused_with_both_versions(
    site: Site, wanted: str
) -> None:
    site.add("grain", requires=f"sdxl-train{wanted}")

    with pytest.raises(PluginError) as caught:
        PluginHost().enable("grain")

    text = str(caught.value)
    assert "plugin 'grain' (grain-dist 1.0) is for sdxl-train" in text
    assert all(part in text for part in wanted.split(","))
    assert f"this is sdxl-train {__version__}" in text
    assert "grain_dist_module" not in sys.modules


def test_a_requirement_that_cannot_be_read_is_told(site: Site) -> None:
    site.add("grain", requires="sdxl-train>=new")

    with pytest.raises(PluginError, match="cannot be read: 'sdxl-train>=new'"):
        PluginHost().enable("grain")


@pytest.mark.parametrize(
    "requires", ["sdxl_train>=0.1", "Sdxl-Train", "sdxl-train-lycoris>=9", "sdxl-train>=0.1.dev0"]
)
def test_a_plugin_for_this_version_loads(site: Site, requires: str) -> None:
    site.add("grain", requires=requires)

    assert PluginHost().enable("grain").name == "grain"


def test_a_deprecated_hook_is_told_once_with_the_name_of_the_plugin(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site.add("grain")
    options = vars(hookspecs.register_noises)["sdxl_train_spec"]
    gone = DeprecationWarning("register_noises goes in 0.3: use register_noise")
    monkeypatch.setitem(options, "warn_on_impl", gone)

    host = PluginHost()
    host.load("grain")
    assert not caplog.messages
    host.enable("grain")
    host.enable("grain")

    assert caplog.messages == [f"plugin 'grain' (grain-dist 1.0): {gone}"]
