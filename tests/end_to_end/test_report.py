"""A run writes its record and its report as it goes, and training does not notice who watches."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

import pytest

from sdxl_train.cli import main
from sdxl_train.document import command
from sdxl_train.preflight import prepare
from sdxl_train.settings import from_words

if TYPE_CHECKING:
    from pathlib import Path

    from tests.end_to_end.conftest import SameTensors, Trained, TrainLora

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

TRAINED: dict[str, Any] = {
    "max_train_steps": 6,
    "network_dropout": 0.1,
    "validation_split": 0.4,
    "network_args": ["rank_dropout=0.1"],
}


@pytest.fixture(scope="module")
def watched(train_lora: TrainLora, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run with every observer there is."""
    folder = tmp_path_factory.mktemp("watched")
    prompts = folder / "prompts.txt"
    prompts.write_text("a <b>cat</b> --w 64 --h 64 --s 1\n", encoding="utf-8")
    return train_lora(
        **TRAINED,
        report=True,
        progress=True,
        logging_dir=str(folder / "logs"),
        log_config=True,
        sample_prompts=str(prompts),
        sample_every_n_steps=2,
        sample_at_first=True,
        validate_every_n_steps=2,
        save_best=True,
        save_state=True,
        save_every_n_steps=3,
        strict_observers=True,
    )


@pytest.fixture(scope="module")
def record(watched: Trained) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((watched.folder / "photo.run.json").read_text("utf-8"))
    return document


def test_all_observers_together_change_nothing(
    watched: Trained, train_lora: TrainLora, same_tensors: SameTensors
) -> None:
    bare = train_lora(**TRAINED, validate_every_n_epochs=0, plugin=None)
    assert same_tensors(bare.tensors, watched.tensors)


def test_the_record_holds_what_the_steps_gave(watched: Trained, record: dict[str, Any]) -> None:
    assert record["schema_version"] == 2
    history = record["history"]
    assert history["step"] == [1, 2, 3, 4, 5, 6]
    losses = [step["loss"] for step in watched.steps]
    assert history["loss"] == pytest.approx(losses, rel=1e-5)
    assert history["learning_rates"]["unet"] == pytest.approx([1e-3] * 6)
    samples = sum(history["samples"])
    assert samples == sum(len(step["keys"]) for step in watched.steps)
    assert sum(part["samples"] for part in record["loss_by_timestep"]) == samples
    images = record["loss_by_image"]
    assert sum(image["samples"] for image in images) == samples
    assert {image["image"] for image in images} == {k for s in watched.steps for k in s["keys"]}
    assert [image["relative_loss"] for image in images] == sorted(
        (image["relative_loss"] for image in images), reverse=True
    )
    assert record["plan"]["validations"][0] == 2
    assert record["results"]["status"] == "complete"
    assert record["results"]["validations"] == [
        result.as_json() for result in watched.result.validations
    ]
    assert record["speed"]["seconds_per_step"] > 0
    assert record["memory"]["peak_bytes"] > 0
    assert record["warnings"] == list(dict.fromkeys(record["warnings"]))


def test_the_record_holds_pictures_and_norms(watched: Trained, record: dict[str, Any]) -> None:
    samples = record["notes"]["samples"]
    assert [sample["step"] for sample in samples] == [0, 2, 4, 6]
    assert all((watched.folder / sample["path"]).is_file() for sample in samples)
    norms = record["notes"]["weight_norms"]
    assert norms["steps"] == [0, 6]
    # A fresh network adds nothing.
    assert all(each[0] == 0 < each[-1] for each in norms["blocks"].values())
    assert {"te1", "te2", "middle_block"} < norms["blocks"].keys()
    mfu = record["notes"]["mfu"]
    assert mfu["peak_of"] == "measured"
    assert mfu["value"] == pytest.approx(mfu["rate"] / mfu["peak"])
    assert mfu["rate"] > 0


def test_the_report_shows_the_record(watched: Trained) -> None:
    text = (watched.folder / "photo.report.html").read_text(encoding="utf-8")
    assert "6 of 6" in text
    assert text.count("data:image/webp") >= 4
    assert "a &lt;b&gt;cat&lt;/b&gt;" in text
    assert "<b>cat" not in text


def test_the_command_in_the_record_repeats_the_run(record: dict[str, Any]) -> None:
    words = shlex.split(shlex.join(record["command"]))
    assert words[0] == "sdxl-train"
    settings, leading = from_words(words[1:], [])
    assert leading == []
    config = prepare(settings, start=False).config
    again = {name: item["value"] for name, item in config.options().items()}
    assert again == {name: item["value"] for name, item in record["options"].items()}
    assert command(config, 42) == record["command"]


def test_a_resumed_run_goes_on_with_the_record(watched: Trained, train_lora: TrainLora) -> None:
    options = dict(watched.options) | {"resume": str(watched.folder / "photo-step00000003-state")}
    again = train_lora(**options)
    record = json.loads((again.folder / "photo.run.json").read_text(encoding="utf-8"))
    assert record["history"]["step"] == [1, 2, 3, 4, 5, 6]
    assert record["notes"]["weight_norms"]["steps"] == [0, 6]
    assert [sample["step"] for sample in record["notes"]["samples"]] == [0, 2, 4, 6]


def test_a_run_that_resumes_into_another_folder_brings_pictures_and_norms(
    watched: Trained, train_lora: TrainLora, tmp_path: Path
) -> None:
    state = watched.folder / "photo-step00000003-state"
    changes = {
        "resume": str(state),
        "max_train_steps": 4,
        "output_name": "again",
        "output_dir": str(tmp_path / "deep" / "er"),
    }
    again = train_lora(**dict(watched.options) | changes)
    record = json.loads((again.folder / "again.run.json").read_text(encoding="utf-8"))
    assert record["notes"]["weight_norms"]["steps"] == [0, 4]
    samples = record["notes"]["samples"]
    assert [sample["step"] for sample in samples] == [0, 2, 4]
    assert all((again.folder / sample["path"]).is_file() for sample in samples)


def test_compare_is_a_command(
    watched: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "both.html"
    report = watched.folder / "photo.report.html"
    assert main(["compare", str(watched.folder), str(report), "--output", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    # Twice the same run: their names are told apart by numbers.
    text = output.read_text(encoding="utf-8")
    assert "1: photo" in text
    assert "None: the options are the same." in text
    assert main(["compare", str(watched.folder), str(tmp_path)]) == 2
    assert "has 0 records" in capsys.readouterr().err
