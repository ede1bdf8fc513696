"""``sdxl-train plugins`` and ``sdxl-train components``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sdxl_train import __version__

if TYPE_CHECKING:
    from tests.core.conftest import Command, Site

MARK = "import pathlib\npathlib.Path('imported').touch()\n"


def _rows(text: str) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(text)}


def test_the_list_reads_metadata_only(site: Site, command: Command) -> None:
    site.add("grain", MARK.replace("'imported'", repr(str(site.path / "imported"))))

    done = command("plugins", "--json")

    assert done.returncode == 0
    assert not (site.path / "imported").exists()
    rows = _rows(done.stdout)
    assert rows["grain"] == {
        "name": "grain",
        "state": "installed",
        "distribution": "grain-dist",
        "version": "1.0",
        "entry_point": "grain_dist_module",
        "built_in": False,
        "provides": None,
        "error": None,
    }
    assert rows["sdxl-lora"]["state"] == "enabled"
    assert rows["sdxl-lora"]["version"] == __version__
    assert "lora" in rows["sdxl-lora"]["provides"]["network"]


def test_a_named_plugin_is_imported_and_described(site: Site, command: Command) -> None:
    site.add("film-grain")
    site.add("other", "raise RuntimeError")

    (row,) = json.loads(command("plugins", "Film_Grain", "--json").stdout)

    assert row["state"] == "installed"
    assert row["provides"] == {"noise": ["grain"]}


def test_states_are_told(site: Site, command: Command) -> None:
    for name in ("on", "off", "idle", "twin"):
        site.add(name)
    site.add("twin", distribution="second")
    site.add("bad_one", "import no_such_library")

    listed = command("plugins", "--plugin", "on", "--plugin", "no:off", "--json")
    states = {row["name"]: row["state"] for row in json.loads(listed.stdout)}
    (broken,) = json.loads(command("plugins", "bad_one", "--json").stdout)
    twins = json.loads(command("plugins", "twin", "--json").stdout)

    assert {name: states[name] for name in ("on", "off", "idle", "twin", "bad_one")} == {
        "on": "enabled",
        "off": "blocked",
        "idle": "installed",
        "twin": "ambiguous",
        "bad_one": "installed",
    }
    assert broken["state"] == "broken"
    assert "No module named 'no_such_library'" in broken["error"]
    assert [twin["distribution"] for twin in twins] == ["second", "twin-dist"]
    assert all("second 1.0 and twin-dist 1.0" in twin["error"] for twin in twins)


def test_the_list_can_be_read_by_people(site: Site, command: Command) -> None:
    site.add("grain", version="1.4")

    text = command("plugins").stdout

    assert "grain                    installed  grain-dist 1.4" in text
    assert "not imported; `sdxl-train plugins grain` asks it what it provides" in text
    assert "    optimizer: AdamW" in text


def test_a_plugin_that_is_not_there_is_told(site: Site, command: Command) -> None:
    site.add("grain")

    done = command("plugins", "grian")

    assert done.returncode == 2
    assert "no plugin 'grian' is installed; did you mean grain?" in done.stderr


def test_the_list_comes_even_when_a_named_plugin_is_broken(site: Site, command: Command) -> None:
    site.add("bad", "raise RuntimeError('boom')")

    done = command("plugins", "--plugin", "bad", "--json")

    assert done.returncode == 2
    assert _rows(done.stdout)["bad"]["state"] == "broken"
    assert "RuntimeError: boom" in done.stderr


def test_a_flag_that_is_none_of_the_commands_is_refused(command: Command) -> None:
    done = command("plugins", "--jsn", "--seed", "1")

    assert done.returncode == 2
    assert "--jsn: is no option of sdxl-train plugins\n      -> did you mean json?" in done.stderr
    assert "--seed: is no option of sdxl-train plugins" in done.stderr


def test_plugins_of_a_config_file_count(site: Site, command: Command) -> None:
    site.add("grain")
    file = site.path / "run.toml"
    file.write_text('plugins = ["grain"]\nseed = 1\n', encoding="utf-8")

    done = command("plugins", "--config_file", str(file), "--json")

    assert done.returncode == 0, done.stderr
    assert _rows(done.stdout)["grain"]["state"] == "enabled"


def test_components_are_listed_with_their_options(site: Site, command: Command) -> None:
    site.add("grain")

    entries = json.loads(command("components", "--plugin", "grain", "--json").stdout)
    by_name = {f"{entry['plugin']}:{entry['kind']}:{entry['name']}": entry for entry in entries}

    assert by_name["grain:noise:grain"] == {
        "kind": "noise",
        "name": "grain",
        "plugin": "grain",
        "default": False,
        "chosen_by": "--noise",
        "description": "Grain, for tests.",
        "options": [
            {
                "name": "grain",
                "flag": "--grain",
                "expects": "a number >= 0",
                "required": False,
                "default": None,
                "description": "Strength of the grain.",
            }
        ],
    }
    adamw = by_name["sdxl-lora:optimizer:AdamW"]
    flags = {option["flag"] for option in adamw["options"]}
    assert {"--learning_rate", "--optimizer_args betas"} <= flags


def test_components_of_one_kind_and_one_component(site: Site, command: Command) -> None:
    site.add("grain")

    kind = command("components", "noise", "--plugin", "grain").stdout
    one = command("components", "noise:grain:grain").stdout

    assert kind.startswith("noise (--noise)\n")
    assert "noise-offset" in kind
    assert "Strength of the grain." not in kind
    assert "--grain X" in one
    assert "Strength of the grain." in one


def test_an_unknown_kind_or_component_is_told(command: Command) -> None:
    kind = command("components", "networks")
    name = command("components", "network:lorra")

    assert (kind.returncode, name.returncode) == (2, 2)
    assert "no kind is called 'networks'\n      -> did you mean network?" in kind.stderr
    assert "no network is called 'lorra'; did you mean lora?" in name.stderr
