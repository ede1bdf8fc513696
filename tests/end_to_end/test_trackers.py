"""Trackers get sd-scripts' keys and the numbers of the steps; keys stay secret."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sdxl_train
from sdxl_train import History, StepResult, UserError

if TYPE_CHECKING:
    from tests.end_to_end.conftest import (
        MakeOptions,
        SameTensors,
        StartCommand,
        Trained,
        TrainLora,
    )

SECRET = "0123456789abcdef" * 2 + "deadbeef"
KEYS = {
    "loss/current",
    "loss/average",
    "loss/epoch_average",
    "lr/unet",
    "lr/textencoder",
    "max_norm/keys_scaled",
    "max_norm/avg_key_norm",
    "max_norm/max_key_norm",
    "loss/validation/step_average",
    "loss/validation/step_divergence",
    "loss/validation/epoch_average",
    "loss/validation/epoch_divergence",
    *(f"loss/validation/timestep_{timestep}" for timestep in (200, 400, 600, 800)),
}
WATCHED: dict[str, Any] = {
    "max_train_steps": 13,
    "validation_split": 0.4,
    "validate_every_n_steps": 3,
    "scale_weight_norms": 1.0,
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a cat --w 64 --h 64 --s 1\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tracked(
    train_lora: TrainLora, prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Trained, Path]:
    logs = tmp_path_factory.mktemp("logs")
    run = train_lora(
        **WATCHED,
        logging_dir=str(logs),
        log_prefix="cat-",
        log_config=True,
        sample_prompts=str(prompts),
        sample_every_n_steps=13,
    )
    assert run.result.observer_failures == {}
    return run, logs


def events_in(logs: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (path for path in logs.glob("*/network_train/events.*"))
    assert re.fullmatch(r"cat-\d{14}", file.parents[1].name)
    accumulator = EventAccumulator(str(file.parent), size_guidance={"images": 0})
    return accumulator.Reload()


def test_tensorboard_gets_the_keys_and_the_numbers(tracked: tuple[Trained, Path]) -> None:
    run, logs = tracked
    events = events_in(logs)
    assert set(events.Tags()["scalars"]) - {"hparam/epoch"} == KEYS
    current = events.Scalars("loss/current")
    assert [event.step for event in current] == list(range(1, 14))
    losses = [step["loss"] for step in run.steps]
    assert [event.value for event in current] == pytest.approx(losses)
    size = sum(step["epoch"] == 1 for step in run.steps)
    averages = [event.value for event in events.Scalars("loss/average")]
    window = [losses[max(0, index + 1 - size) : index + 1] for index in range(len(losses))]
    assert averages == pytest.approx([sum(part) / len(part) for part in window])
    epochs = [(event.step, event.value) for event in events.Scalars("loss/epoch_average")]
    assert [step for step, _ in epochs] == list(range(1, len(epochs) + 1))
    assert epochs[0][1] == pytest.approx(sum(losses[:size]) / size)
    rates = [event.value for event in events.Scalars("lr/unet")]
    assert rates == pytest.approx([step["learning_rates"]["unet"] for step in run.steps])


def test_tensorboard_gets_validation_and_pictures(tracked: tuple[Trained, Path]) -> None:
    run, logs = tracked
    events = events_in(logs)
    by_step = [result for result in run.result.validations if "step" in result.due]
    logged = events.Scalars("loss/validation/step_average")
    assert [(event.step, event.value) for event in logged] == [
        (result.step, pytest.approx(result.loss)) for result in by_step
    ]
    average = events.Scalars("loss/average")[by_step[0].step - 1].value
    divergence = events.Scalars("loss/validation/step_divergence")[0].value
    assert divergence == pytest.approx(by_step[0].loss - average, abs=1e-6)
    by_epoch = [result for result in run.result.validations if "epoch" in result.due]
    assert [e.step for e in events.Scalars("loss/validation/epoch_average")] == [
        result.epoch for result in by_epoch
    ]
    (picture,) = events.Images("sample_0")
    assert (picture.step, picture.width, picture.height) == (13, 64, 64)


def test_trackers_change_nothing(
    train_lora: TrainLora, tracked: tuple[Trained, Path], same_tensors: SameTensors
) -> None:
    assert same_tensors(train_lora(**WATCHED).tensors, tracked[0].tensors)


def test_weights_and_biases_offline_by_the_command(
    start_command: StartCommand,
    options: MakeOptions,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = tmp_path / "trackers.toml"
    settings.write_text('[wandb]\ntags = ["night"]\n', encoding="utf-8")
    chosen = options(
        plugin=None,
        max_train_steps=3,
        log_with="all",
        logging_dir=str(tmp_path / "logs"),
        log_tracker_name="cats",
        log_tracker_config=str(settings),
        log_config=True,
        wandb_run_name="first cat",
        wandb_api_key=SECRET,
        sample_prompts=str(prompts),
    )
    process = start_command(chosen)
    output, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    assert "failed" not in log
    assert "--wandb_api_key: a secret on a command line stays in the shell's history" in log
    assert SECRET not in output + log

    (file,) = (tmp_path / "logs").glob("*/wandb/offline-run-*/run-*.wandb")
    records = wandb_records(file)
    (run,) = (record.run for record in records if record.HasField("run"))
    assert (run.display_name, run.project, list(run.tags)) == ("first cat", "cats", ["night"])
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    for record in records:
        for item in record.config.update:
            config[item.key] = json.loads(item.value_json)
    assert config["network_dim"] == 4
    assert not {"wandb_api_key", "train_data_dir", "output_dir"} & config.keys()
    rows = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row.item}
        for row in (record.history for record in records if record.HasField("history"))
    ]
    steps = [row for row in rows if "loss/current" in row]
    assert [(row["global_step"], row["epoch"]) for row in steps] == [(1, 1), (2, 1), (3, 1)]
    assert any("sample_0" in row or "sample_0._type" in row for row in rows)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    written += [path for path in Path(chosen["output_dir"]).rglob("*") if path.is_file()]
    assert len(written) > 5
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []


def wandb_records(path: Path) -> list[Any]:
    """Read a log of Weights & Biases: LevelDB's format, records cut into blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        if room < 7 or kind == 0:
            position += room
            continue
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"log_with": "tensorboard"}, "tensorboard needs a folder to log to"),
        ({"log_with": "all"}, "all needs a folder to log to"),
        ({"log_with": "wandb"}, "no key of Weights & Biases is known"),
        ({"log_with": "mlflow"}, "'mlflow'"),
        ({"log_tracker_config": "none.toml", "logging_dir": "logs"}, "none.toml"),
    ],
)
def test_what_a_tracker_lacks_is_told_at_once(
    options: MakeOptions,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    changes: dict[str, Any],
    told: str,
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(UserError) as raised:
        sdxl_train.plan(options(**changes))
    assert told.strip("'") in str(raised.value)


def test_tables_of_other_trackers_and_two_names_are_refused(
    options: MakeOptions, tmp_path: Path
) -> None:
    settings = tmp_path / "trackers.toml"
    settings.write_text('[wandb]\nname = "a"\nmode = "offline"\n[aim]\n', encoding="utf-8")
    with pytest.raises(UserError) as raised:
        sdxl_train.plan(
            options(log_with="wandb", log_tracker_config=str(settings), wandb_run_name="b")
        )
    assert "aim" in str(raised.value)
    assert "has a name" in str(raised.value)


def test_options_without_a_tracker_are_remarked_on(options: MakeOptions) -> None:
    warnings = sdxl_train.plan(options(log_prefix="x", wandb_run_name="y")).warnings
    assert "option log_prefix has no effect without --logging_dir" in warnings
    assert "option wandb_run_name has no effect without --log_with wandb" in warnings


def test_a_secret_is_written_to_no_options_file(options: MakeOptions, tmp_path: Path) -> None:
    from sdxl_train.cli import main
    from tests.end_to_end.conftest import as_flags

    target = tmp_path / "run.toml"
    words = as_flags(options(plugin=None, wandb_api_key=SECRET))
    assert main([*words, "--config_file", str(target), "--output_config"]) == 0
    text = target.read_text(encoding="utf-8")
    assert "network_dim" in text
    assert "wandb_api_key" not in text


def test_logging_reads_no_more_numbers_off_the_device(
    train_lora: TrainLora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Count the operation behind item() and bool(), which waits for the device."""
    monkeypatch.setattr("sdxl_train.history.READ_EVERY", 2)

    def reads(**changes: Any) -> int:
        with CountReads() as count:
            train_lora(plugin=None, max_train_steps=3, **changes)
        return int(count.reads)

    logged = reads(logging_dir=str(tmp_path))
    assert logged == reads()


def test_steps_are_read_from_the_device_ten_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers: list[int] = []
    plain = torch.Tensor.tolist

    def tolist(tensor: torch.Tensor) -> Any:
        transfers.append(len(tensor))
        return plain(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    history = History(["a", "b"], steps_per_epoch=4)
    with CountReads() as count:
        for number in range(1, 26):
            history.add(step_of(number), 0.5)
            assert len(history) == number // 10 * 10
    assert count.reads == 0
    # Of a step: its loss, its gradient's norm, and of two samples timestep and loss.
    assert transfers == [60, 60]
    history.read()
    assert transfers == [60, 60, 30]
    assert [row.loss for row in history.since(0)] == [float(n) for n in range(1, 26)]
    assert next(history.since(24)).average_loss == (22 + 23 + 24 + 25) / 4


def test_a_step_costs_the_same_after_many_steps() -> None:
    """No step copies, or makes anew, what all steps before it have left."""

    def most_bytes(before: int) -> int:
        history = History(["a", "b"], steps_per_epoch=4)
        history.load_state_dict({**begun, "columns": {n: [1.0] * before for n in columns}})
        for number in range(10):  # after which its columns have room for more
            history.add(step_of(before + number), 0.5)
        tracemalloc.start()
        for number in range(10, 30):
            history.add(step_of(before + number), 0.5)
            newest = history.newest()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert newest is not None
        assert len(history) == before + 30
        return most

    history = History(["a", "b"], steps_per_epoch=4)
    history.add(step_of(1), 0.5)
    begun = history.state_dict()
    columns = begun["columns"]
    assert len(columns) > 5
    assert most_bytes(20_000) - most_bytes(1000) < 20_000  # an eighth of one column of numbers


def step_of(number: int) -> StepResult:
    return StepResult(
        step=number,
        epoch=1,
        loss=torch.tensor(float(number)),
        grad_norm=torch.tensor(1.0),
        learning_rates={"unet": 1e-3},
        keys=("a", "b"),
        timesteps=torch.tensor([0, 999]),
        sample_losses=torch.tensor([1.0, 2.0]),
    )


class CountReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts reads of single numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_tracker_of_ones_own_is_ten_lines(train_lora: TrainLora, tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "watching.md"
    code = re.search(r"```python\n(.*?step_finished.*?)```", page.read_text("utf-8"), re.DOTALL)
    assert code is not None
    assert len([line for line in code[1].splitlines() if line.strip()]) <= 10
    plugin = tmp_path / "json_lines.py"
    plugin.write_text(code[1], encoding="utf-8")
    run = train_lora(plugin=[str(plugin)], max_train_steps=2)
    rows = [json.loads(line) for line in (run.folder / "steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[-1]["loss"] == run.result.final_loss
