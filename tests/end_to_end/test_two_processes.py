"""Two processes with batches of B train as one with batches of 2 B: real processes, over gloo."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from sdxl_train.cli import main
from tests.end_to_end.conftest import as_flags, begin_forked, read_metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from multiprocessing.context import ForkServerContext
    from pathlib import Path

    from tests.end_to_end.conftest import MakeOptions, SameTensors, Trained, TrainLora

STEPS = 10

# Plain gradient descent moves a weight by what its gradient is. Adam divides by the gradient's
# size, so a gradient that is only rounding would show as a whole step.
DESCENT = {"optimizer_type": "SGD", "learning_rate": 0.1, "max_train_steps": STEPS}

STATES = "text encoders, LoRA+, noises, accumulation"
SAMPLED = "caches, prior and masked loss, batches too small for two"
SPREAD = "the same with spread weights"
ADAMW = "AdamW at a usual rate"

SCENARIOS: dict[str, dict[str, Any]] = {
    STATES: {
        "network_args": ["loraplus_lr_ratio=4"],
        "gradient_accumulation_steps": 2,
        "noise_offset": 0.05,
        "adaptive_noise_scale": 0.1,
        "multires_noise_iterations": 4,
        "ip_noise_gamma": 0.1,
        "immiscible_noise": True,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "train_batch_size": 2,
        "save_every_n_steps": STEPS // 2,
        "save_state": True,
    },
    SAMPLED: {
        "network_train_unet_only": True,
        "cache_latents": True,
        "cache_text_encoder_outputs": True,
        "prior_loss_weight": 0.5,
        "alpha_mask": True,
        "train_batch_size": 1,
        "sample_every_n_steps": STEPS,
        "validation_split": 0.2,
        "validate_every_n_steps": STEPS // 2,
        "report": True,
    },
    "LoKr of LyCORIS": {
        "plugin": ["lycoris"],
        "network_module": "lycoris.kohya",
        "network_args": ["algo=lokr", "factor=4"],
        "cache_latents_to_disk": True,
        "cache_latents": True,
        "flip_aug": True,
        "ddp_gradient_as_bucket_view": True,
        "ddp_static_graph": True,
        "train_batch_size": 1,
    },
    ADAMW: {"optimizer_type": "AdamW", "learning_rate": 1e-4, "train_batch_size": 1},
}

SHARING = '''
"""Squares numbers in all processes at the second step, and fails in one of them at the third."""
import json
import os
import pathlib

from sdxl_train import Observer, hookimpl


class Squares:
    def __init__(self, run):
        self.run = run

    def step_finished(self, step):
        def do(numbers):
            for number in numbers:
                if step.step == 3 and os.environ.get("RANK") == "1":
                    raise ValueError("no more squares")
                yield number**2

        squares = list(self.run.share_out(range(5), do))
        if self.run.main:
            (self.run.output_dir / "squares.json").write_text(json.dumps([step.step, squares]))


class SharedSquares(Observer):
    """Squares numbers."""

    everywhere = True

    def build(self, run):
        return Squares(run)


class Scales:
    def __init__(self, run):
        self.run = run

    def run_finished(self):
        own = 0
        for parameter in self.run.assembly.model.denoiser.parameters():
            part = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            own += part.untyped_storage().nbytes()
        pathlib.Path(f"bytes-{os.environ['RANK']}").write_text(str(own))


class Weighed(Observer):
    """Weighs what this process has of the U-Net."""

    everywhere = True

    def build(self, run):
        return Scales(run)


@hookimpl
def register_observers():
    return {"squares": SharedSquares, "scales": Weighed}
'''

HALFWAY = STEPS // 2
STATE = f"photo-step{HALFWAY:08d}-state"


def train_as_one_of_two(index: int, meeting: Path, runs: Mapping[str, dict[str, Any]]) -> None:
    """Train every run in turn, as process ``index``, and write down what it made and sent."""
    import sdxl_train
    from sdxl_lora_plugins.observers.sampling import Sampling
    from sdxl_train.data.cache import LatentCache

    os.environ.update(RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    begin_forked()
    # A relative path leads each process elsewhere, as if each ran on a machine of its own.
    os.chdir(meeting.with_name(f"machine-{index}"))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=index, world_size=2
    )
    latents: list[int] = []
    pictures: list[int] = []
    sent: list[int] = []
    _observe(LatentCache, "_encode", lambda _, spec, *rest: latents.append(len(spec.samples)))
    _observe(Sampling, "_draw", lambda _, number: pictures.append(number))
    for collective in ("all_reduce", "broadcast", "all_gather", "gather", "scatter"):
        _observe(torch.distributed, collective, lambda tensor, *_: sent.append(tensor.numel()))
    results = {}
    for name, options in runs.items():
        for seen in (latents, pictures, sent):
            seen.clear()
        result = sdxl_train.train(options)
        results[name] = {
            "latents": sum(latents),
            "pictures": list(pictures),
            "sent": list(sent),
            "loss": result.final_loss,
            "steps": result.steps,
        }
    meeting.with_name(f"results-{index}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


def _observe(owner: Any, name: str, tell: Callable[..., object]) -> None:
    """Have a function tell of its arguments each time it is called."""
    original = getattr(owner, name)

    def observed(*arguments: Any, **options: Any) -> Any:
        tell(*arguments)
        return original(*arguments, **options)

    setattr(owner, name, observed)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Path:
    """The photographs, half of each transparent."""
    folder = tmp_path_factory.mktemp("masked")
    for path in (photographs / "2_photo").iterdir():
        target = folder / "2_photo" / path.name
        target.parent.mkdir(exist_ok=True)
        if path.suffix == ".png":
            image = Image.open(path).convert("RGBA")
            image.putalpha(Image.linear_gradient("L").resize(image.size))
            image.save(target)
        else:
            target.write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def regularization(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image, which makes the number of square ones odd."""
    folder = tmp_path_factory.mktemp("regularization")
    (folder / "1_thing").mkdir()
    Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(folder / "1_thing" / "0.png")
    (folder / "1_thing" / "0.txt").write_text("a thing")
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a cat --s 2 --w 64 --h 64\ndice --s 2\na rocket --s 2 --d 3\n")
    return path


@pytest.fixture(scope="module")
def scenarios(
    photographs: Path, masked: Path, regularization: Path, prompts: Path
) -> dict[str, dict[str, Any]]:
    chosen = {name: {**DESCENT, **changes} for name, changes in SCENARIOS.items()}
    for changes in chosen.values():
        if "alpha_mask" in changes:
            changes |= {"train_data_dir": str(masked), "reg_data_dir": str(regularization)}
            changes["sample_prompts"] = str(prompts)
    return chosen


@pytest.fixture(scope="module")
def stopped_alone(scenarios: dict[str, dict[str, Any]], train_lora: TrainLora) -> Trained:
    """One process with the batches of two, which left a state behind in the middle."""
    return train_lora(**{**scenarios[STATES], "train_batch_size": 4})


@pytest.fixture(scope="module")
def together(
    scenarios: dict[str, dict[str, Any]],
    stopped_alone: Trained,
    options: MakeOptions,
    processes: ForkServerContext,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, Any]]:
    """Every scenario trained by two processes: folder, and what each process reports."""
    meeting = tmp_path_factory.mktemp("meeting") / "store"
    machines = [meeting.with_name(f"machine-{index}") for index in range(2)]
    for machine in machines:
        machine.mkdir()
    runs = {name: options(**changes) for name, changes in scenarios.items()}
    runs[SAMPLED] |= {"log_with": "tensorboard", "logging_dir": "logs"}
    sharing = tmp_path_factory.mktemp("plugins") / "sharing.py"
    sharing.write_text(SHARING, encoding="utf-8")
    runs[ADAMW] |= {"plugin": [str(sharing)], "observer": "squares"}
    runs[SPREAD] = options(**scenarios[SAMPLED], plugin=[str(sharing)], observer="scales")
    runs[SPREAD] |= {"fsdp": True, "report": False}
    going_on = {**scenarios[STATES], "save_state": False, "save_every_n_steps": None}
    runs[STATES]["output_dir"] = "two"
    runs["two to two"] = options(**going_on, output_dir="two-to-two", resume=f"two/{STATE}")
    alone = str(stopped_alone.folder / STATE)
    runs["one to two"] = options(**going_on, output_dir="one-to-two", resume=alone)
    pair = [
        processes.Process(target=train_as_one_of_two, args=(index, meeting, runs))
        for index in range(2)
    ]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
    assert [process.exitcode for process in pair] == [0, 0]
    reports = [
        json.loads(meeting.with_name(f"results-{index}.json").read_text()) for index in range(2)
    ]
    return {
        name: {
            "folder": machines[0] / run["output_dir"],
            "reports": [report[name] for report in reports],
        }
        for name, run in runs.items()
    } | {"machines": {"folders": machines}}


@pytest.fixture(scope="module")
def alone(
    scenarios: dict[str, dict[str, Any]],
    together: object,
    stopped_alone: Trained,
    train_lora: TrainLora,
) -> dict[str, Trained]:
    """Every scenario trained by one process, with batches as large as those of both.

    After ``together``, which so finds no caches.
    """
    return {STATES: stopped_alone} | {
        name: train_lora(**{**changes, "train_batch_size": 2 * changes["train_batch_size"]})
        for name, changes in scenarios.items()
        if name != STATES
    }


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_train_as_one_with_twice_the_batch(
    name: str, alone: dict[str, Trained], together: dict[str, dict[str, Any]]
) -> None:
    one, two = alone[name], together[name]
    tensors = load_file(two["folder"] / "photo.safetensors")
    assert tensors.keys() == one.tensors.keys()
    differences = torch.cat([(tensors[key] - one.tensors[key]).flatten() for key in tensors]).abs()
    if name == ADAMW:
        # Adam divides by the size of the gradient, so the few that are little but rounding move
        # their weights by whole steps. So does one process that rounds otherwise
        # (docs/distributed.md).
        assert (differences > 1e-6).float().mean() < 0.01
        assert differences.mean() < 1e-3 * one.options["learning_rate"]
    else:
        assert differences.max() < 1e-6
    for report in two["reports"]:
        assert report["steps"] == STEPS
        assert report["loss"] == pytest.approx(one.result.final_loss, abs=1e-5)
    metadata = read_metadata(two["folder"] / "photo.safetensors")
    for key in ("ss_total_batch_size", "ss_num_batches_per_epoch", "ss_num_epochs", "ss_steps"):
        assert metadata[key] == one.metadata[key], key


def test_each_latent_is_encoded_once(together: dict[str, dict[str, Any]]) -> None:
    cached = {
        # Five photographs and one for regularization; five, plain and mirrored.
        SAMPLED: 6,
        "LoKr of LyCORIS": 10,
    }
    for name, latents in cached.items():
        first, second = (report["latents"] for report in together[name]["reports"])
        assert first + second == latents
        assert first
        assert second


def test_main_process_alone_writes_and_tells(together: dict[str, dict[str, Any]]) -> None:
    folder = together[STATES]["folder"]
    written = {path.name for path in folder.iterdir()}
    saved = {f"photo-step{step:08d}" for step in (HALFWAY, STEPS)}
    assert written == {
        *("initial.st", "steps.json", "photo.safetensors", "photo-state", "photo.run.json"),
        *(f"{name}.safetensors" for name in saved),
        *(f"{name}-state" for name in saved),
    }
    steps = json.loads((folder / "steps.json").read_text())
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    # All images of an epoch, which is two steps, whichever process had them.
    assert sum(len(step["keys"]) for step in steps[:2]) == 10


def test_prompts_are_dealt_and_pictures_are_those_of_one_process(
    alone: dict[str, Trained], together: dict[str, dict[str, Any]]
) -> None:
    two = together[SAMPLED]
    assert [report["pictures"] for report in two["reports"]] == [[0, 2], [1]]
    folders = [alone[SAMPLED].folder, two["folder"]]
    drawn = [sorted((folder / "sample").iterdir()) for folder in folders]
    assert [len(pictures) for pictures in drawn] == [3, 3]
    for pictures in zip(*drawn, strict=True):
        with Image.open(pictures[0]) as first, Image.open(pictures[1]) as second:
            assert first.info == second.info
            one, other = (torch.tensor(list(image.tobytes())) for image in (first, second))
        assert (one - other).abs().max() <= 1


def test_observer_that_fails_in_one_process_is_left_out_in_all(
    together: dict[str, dict[str, Any]],
) -> None:
    folder = together[ADAMW]["folder"]
    assert json.loads((folder / "squares.json").read_text()) == [2, [0, 1, 4, 9, 16]]
    failures = json.loads((folder / "photo.run.json").read_text())["results"]["observer_failures"]
    (fault,) = failures.values()
    assert fault == ("step_finished: AttemptError: process 1 of 2: ValueError: no more squares")


def test_report_and_trackers_are_written_once(together: dict[str, dict[str, Any]]) -> None:
    folder, logs = (together[SAMPLED]["folder"], together["machines"]["folders"][0] / "logs")
    assert (folder / "photo.report.html").is_file()
    assert len(list(logs.glob("**/events.out.tfevents.*"))) == 1
    record = json.loads((folder / "photo.run.json").read_text())
    assert record["results"]["status"] == "complete"
    assert not record["results"]["observer_failures"]
    assert record["results"]["steps"] == STEPS


def test_only_what_trains_is_sent(together: dict[str, dict[str, Any]]) -> None:
    two = together[ADAMW]
    tensors = load_file(two["folder"] / "photo.safetensors")
    trained = [tensor.numel() for name, tensor in tensors.items() if not name.endswith("alpha")]
    for report in two["reports"]:
        # Each roll call is of four numbers; the last, of one, waits for all to have ended.
        large = [numel for numel in report["sent"] if numel > 4]
        # Once a step: each gradient, a flag for each, the losses of up to two samples, their mean.
        assert len(large) == STEPS
        assert set(large) <= {sum(trained) + len(trained) + 1 + samples for samples in (1, 2)}


def test_state_of_two_goes_on_in_two_without_a_shared_disk_bit_for_bit(
    together: dict[str, dict[str, Any]], same_tensors: SameTensors
) -> None:
    straight, resumed = (
        load_file(together[name]["folder"] / "photo.safetensors") for name in (STATES, "two to two")
    )
    assert same_tensors(straight, resumed)
    first, second = together["machines"]["folders"]
    assert (first / "two" / STATE).is_dir()
    # What the observer of the test has written there, and no file of a run.
    assert [path.name for path in second.iterdir()] == ["bytes-1"]


def test_states_pass_between_one_and_two_processes(
    together: dict[str, dict[str, Any]],
    scenarios: dict[str, dict[str, Any]],
    stopped_alone: Trained,
    train_lora: TrainLora,
) -> None:
    state = together[STATES]["folder"] / STATE
    whole = {**scenarios[STATES], "train_batch_size": 4, "save_state": False}
    results = [
        train_lora(**whole, resume=str(state)).tensors,
        load_file(together["one to two"]["folder"] / "photo.safetensors"),
    ]
    for tensors in results:
        for key, tensor in stopped_alone.tensors.items():
            torch.testing.assert_close(tensors[key], tensor, rtol=0, atol=1e-6)


def test_spread_weights_train_and_draw_the_same_with_half_of_them_in_each_process(
    alone: dict[str, Trained], together: dict[str, dict[str, Any]]
) -> None:
    one, two = alone[SAMPLED], together[SPREAD]
    tensors = load_file(two["folder"] / "photo.safetensors")
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=1e-6)
    losses = [_validations(folder) for folder in (one.folder, two["folder"])]
    assert [len(each) for each in losses] == [3, 3]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert len(list((two["folder"] / "sample").iterdir())) == 3

    with safe_open(one.options["pretrained_model_name_or_path"], "pt") as file:
        names = [name for name in file.offset_keys() if name.startswith("model.diffusion_model.")]
        whole = sum(file.get_tensor(name).numel() * 4 for name in names)
    for index, machine in enumerate(together["machines"]["folders"]):
        own = int((machine / f"bytes-{index}").read_text())
        # A first dimension that is odd is filled up: 0.1 % in all.
        assert own == pytest.approx(whole / 2, rel=0.01)


def _validations(folder: Path) -> list[float]:
    results = json.loads((folder / "photo.run.json").read_text())["results"]
    return [measured["loss"] for measured in results["validations"]]


def test_plan_of_two_is_that_of_one_with_twice_the_batch(
    options: MakeOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = options(
        train_batch_size=None,
        max_train_epochs=3,
        max_train_steps=None,
        gradient_accumulation_steps=2,
    )
    plans = []
    for words in (["--train_batch_size", "2"], ["--train_batch_size", "1", "--num_processes", "2"]):
        assert main(["plan", *as_flags(chosen), *words, "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out)["steps"])
    assert [plan.pop("processes") for plan in plans] == [1, 2]
    assert plans[0] == plans[1]
