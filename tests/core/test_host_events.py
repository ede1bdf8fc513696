"""Blame names the plugin, and what happens to an observer stays with it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from sdxl_train.blame import blame
from sdxl_train.components import Noise
from sdxl_train.errors import SdxlTrainError
from sdxl_train.events import Events
from sdxl_train.plugins import PluginHost
from sdxl_train.registry import KIND_BY_NAME, Registry

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.core.conftest import Command, Site

FAULTY = """
from sdxl_train import Command, Noise, hookimpl

class Faulty(Noise):
    def build(self, schedule):
        if schedule is None:
            raise ValueError("no schedule")
        def transform(noise, latents, timesteps, generator):
            return [].pop()
        return transform

class Crash(Command):
    \"\"\"Crash, for tests.\"\"\"
    def run(self):
        return {}["missing"]

@hookimpl
def register_noises():
    return {"faulty": Faulty}

@hookimpl
def register_commands():
    return {"crash": Crash}
"""

EVENTFUL = """
from sdxl_train import hookimpl
heard = []

@hookimpl
def run_started(run):
    heard.append(run)
    raise RuntimeError("tracker is offline")

@hookimpl
def run_finished(error):
    heard.append(error)
"""


def _notes(action: Callable[[], object], host: PluginHost) -> list[str]:
    with pytest.raises((ValueError, IndexError, KeyError)) as caught:
        action()
    blame(caught.value, host.enabled.values())
    blame(caught.value, host.enabled.values())
    return list(getattr(caught.value, "__notes__", []))


def _faulty(host: PluginHost) -> Noise:
    component = Registry(host).find(KIND_BY_NAME["noise"], "faulty").component()
    assert isinstance(component, Noise)
    return component


def test_blame_names_the_plugin_whose_build_raised(site: Site) -> None:
    site.add("wild", FAULTY, version="0.3", distribution="sdxl-train-wild")
    host = PluginHost()
    noise = _faulty(host)

    notes = _notes(lambda: noise.build(None), host)  # type: ignore[arg-type]

    assert notes == ["raised in plugin 'wild' (sdxl-train-wild 0.3)"]


def test_blame_names_the_plugin_whose_callable_raised(site: Site) -> None:
    site.add("wild", FAULTY)
    host = PluginHost()
    transform = _faulty(host).build(object())  # type: ignore[arg-type]

    notes = _notes(lambda: transform(None, None, None, None), host)  # type: ignore[arg-type]

    assert notes == ["raised in plugin 'wild' (wild-dist 1.0)"]


def test_blame_follows_the_package_of_the_entry_point(site: Site) -> None:
    package = site.path / "wild_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "plugin.py").write_text(
        "from wild_package.parts import Faulty\nfrom sdxl_train import hookimpl\n"
        "@hookimpl\ndef register_noises():\n    return {'faulty': Faulty}\n",
        encoding="utf-8",
    )
    (package / "parts.py").write_text(FAULTY, encoding="utf-8")
    site.add("wild", None, target="wild_package.plugin")
    site.add("tame", site.noise)
    host = PluginHost()
    host.enable("tame")
    noise = _faulty(host)

    notes = _notes(lambda: noise.build(None), host)  # type: ignore[arg-type]

    assert notes == ["raised in plugin 'wild' (wild-dist 1.0)"]


def test_nobody_is_blamed_for_what_no_plugin_raised(site: Site) -> None:
    site.add("wild", FAULTY)
    host = PluginHost()
    host.enable("wild")

    assert _notes(lambda: int("x"), host) == []


def test_the_command_line_blames_the_plugin_of_a_crash(site: Site, command: Command) -> None:
    site.add("wild", FAULTY)

    done = command("crash")

    assert done.returncode == 1
    assert "KeyError: 'missing'" in done.stderr
    assert "raised in plugin 'wild' (wild-dist 1.0)" in done.stderr


@dataclass
class Recorder:
    """Compares by value and has no hash, as every dataclass."""

    heard: list[Any] = field(default_factory=list)

    def run_started(self, run: Any) -> None:
        self.heard.append(run)

    def step_finished(self, step: Any) -> None:
        self.heard.append(step)

    def run_finished(self, run: Any, error: BaseException | None) -> None:
        self.heard.append(error)


class Failing(Recorder):
    def step_finished(self, step: Any) -> None:
        super().step_finished(step)
        raise RuntimeError("disk full")


class Exiting(Recorder):
    def step_finished(self, step: Any) -> None:
        raise SystemExit(7)


def _events(host: PluginHost, *, strict: bool = False) -> Events:
    return Events(host.manager, list(host.enabled.values()), strict=strict)


def test_observers_hear_the_arguments_that_they_ask_for() -> None:
    events, recorder = _events(PluginHost()), Recorder()
    events.add_observer("recorder", recorder)

    events.tell("run_started", run="run")
    events.tell("step_finished", run="run", step="step")
    events.tell("checkpoint_saved", run="run", checkpoint="file")
    events.tell("run_finished", run="run", error=None)

    assert recorder.heard == ["run", "step", None]


@pytest.mark.parametrize("observer", [Failing, Exiting])
def test_a_failing_observer_is_reported_once_and_left_out(
    observer: type[Recorder], caplog: pytest.LogCaptureFixture
) -> None:
    events, failing, sound = _events(PluginHost()), observer(), Recorder()
    events.add_observer("bad", failing)
    events.add_observer("good", sound)

    for step in range(3):
        events.tell("step_finished", run=None, step=step)
    events.tell("run_finished", run=None, error=None)

    assert sound.heard == [0, 1, 2, None]
    assert None not in failing.heard
    assert list(events.failures) == ["observer bad"]
    (warning,) = caplog.messages
    assert warning.startswith("observer bad failed in step_finished and is left out from here on")


class Keeper(Recorder):
    kept: Any = None

    def state_dict(self) -> Any:
        if isinstance(self.kept, Exception):
            raise self.kept
        return {"kept": self.kept}

    def load_state_dict(self, state: Any) -> None:
        self.kept = state["kept"]


def test_an_observer_that_acts_everywhere_keeps_nothing_in_states() -> None:
    events = _events(PluginHost())
    with pytest.raises(SdxlTrainError, match="acts everywhere"):
        events.add_observer("keeper", Keeper(), everywhere=True)


def test_observers_keep_what_they_know_and_cannot_spoil_a_state() -> None:
    events, keepers = _events(PluginHost()), [Keeper(), Keeper(), Keeper()]
    events.add_observer("plain", Recorder())
    for name, keeper, kept in zip(
        ("sound", "broken", "odd"),
        keepers,
        ((1, 2.5), ConnectionError("gone"), object()),
        strict=True,
    ):
        keeper.kept = kept
        events.add_observer(name, keeper)

    assert events.states() == {"sound": {"kept": (1, 2.5)}}
    assert events.failures["observer broken"] == "state_dict: ConnectionError: gone"
    assert "which has no place in a file" in events.failures["observer odd"]

    events.restore({"sound": {"kept": 3}, "absent": {"kept": 4}})
    assert keepers[0].kept == 3


def test_keepers_hear_of_a_step_before_it_is_saved() -> None:
    events, keeper, plain = _events(PluginHost()), Keeper(), Recorder()
    events.add_observer("keeper", keeper)
    events.add_observer("plain", plain)
    events.tell("step_finished", keepers=True, run=None, step=1)
    assert (keeper.heard, plain.heard) == ([1], [])
    events.tell("step_finished", keepers=False, run=None, step=1)
    assert (keeper.heard, plain.heard) == ([1], [1])


def test_a_strict_run_ends_with_its_observer() -> None:
    events = _events(PluginHost(), strict=True)
    events.add_observer("bad", Failing())

    with pytest.raises(RuntimeError, match="disk full"):
        events.tell("step_finished", run=None, step=1)


def test_a_failed_run_ends_with_its_own_error_even_if_strict() -> None:
    class Last(Recorder):
        def run_finished(self, run: Any, error: BaseException | None) -> None:
            raise RuntimeError("offline")

    events = _events(PluginHost(), strict=True)
    events.add_observer("last", Last())

    events.tell("run_finished", run=None, error=ValueError("NaN"))

    assert events.failures == {"observer last": "run_finished: RuntimeError: offline"}


def test_a_plugin_that_listens_itself_is_isolated_and_blamed(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    module = site.add("tracker", EVENTFUL)
    host = PluginHost()
    host.enable("tracker")
    events = _events(host)

    events.tell("run_started", run="run")
    events.tell("run_finished", run="run", error=None)

    assert sys.modules[module].heard == ["run"]
    assert events.failures == {"tracker": "run_started: RuntimeError: tracker is offline"}
    assert "raised in plugin 'tracker' (tracker-dist 1.0)" in caplog.text


def test_closing_takes_the_observers_of_the_run_off() -> None:
    host = PluginHost()
    for _ in range(2):
        events, recorder = _events(host), Recorder()
        events.add_observer("recorder", recorder)
        events.tell("run_started", run="run")
        events.close()
        events.tell("run_started", run="run")
        assert recorder.heard == ["run"]


def test_a_misspelt_event_method_names_the_event() -> None:
    class Misspelt(Recorder):
        def step_finish(self, step: Any) -> None: ...

    with pytest.raises(SdxlTrainError, match=r"step_finish, .* did you mean step_finished\?"):
        _events(PluginHost()).add_observer("misspelt", Misspelt())


def test_an_object_without_events_is_refused() -> None:
    with pytest.raises(SdxlTrainError, match=r"\(object\) has no method that is an event"):
        _events(PluginHost()).add_observer("deaf", object())


def test_an_event_method_cannot_ask_for_what_there_is_not() -> None:
    class Wanting:
        def step_finished(self, loss: float) -> None: ...

    class Hoping:
        def step_finished(self, run: Any, step: Any = None) -> None: ...

    events = _events(PluginHost())
    with pytest.raises(SdxlTrainError, match=r"has no argument 'loss'; it offers run, step"):
        events.add_observer("wanting", Wanting())
    with pytest.raises(SdxlTrainError, match="argument 'step' of step_finished has a default"):
        events.add_observer("hoping", Hoping())


def test_an_observer_component_of_a_file_acts(site: Site, tmp_path: Path) -> None:
    file = tmp_path / "watch.py"
    file.write_text(
        "from sdxl_train import Observer, hookimpl\n"
        "class Watch(Observer):\n"
        "    watch: bool = False\n"
        "    def build(self, run):\n"
        "        class Listener:\n"
        "            def run_started(self, run): run.append('seen')\n"
        "        return Listener()\n"
        "@hookimpl\n"
        "def register_observers():\n"
        "    return {'watch': Watch}\n",
        encoding="utf-8",
    )
    host = PluginHost()
    host.apply([(str(file), "--plugin")], [])
    observer: Any = Registry(host).find(KIND_BY_NAME["observer"], "watch").component()
    events = _events(host)
    seen: list[str] = []
    events.add_observer("watch", observer.build(None))

    events.tell("run_started", run=seen)

    assert seen == ["seen"]
