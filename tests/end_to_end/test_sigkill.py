"""SIGKILL at random instants of a run that saves all the time: nothing complete is ever lost."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from sdxl_train.state import complete_states
from tests.end_to_end.conftest import begin_forked

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext

    from tests.end_to_end.conftest import MakeOptions, SameTensors, TrainLora

KILLS = 30
STEPS = 60


def _train(options: dict[str, Any]) -> None:
    """Train in a process of its own, as the command does."""
    import sdxl_train

    begin_forked()
    sdxl_train.train(options)


def _assert_nothing_is_half_written(folder: Path) -> None:
    for path in folder.glob("photo*.safetensors"):
        assert load_file(path), path
    for _, state in complete_states(folder, "photo"):
        assert load_file(state / "parameters.safetensors"), state
        assert load_file(state / "optimizer.safetensors"), state


def test_run_killed_again_and_again_goes_on_to_the_straight_result(
    processes: ForkServerContext,
    options: MakeOptions,
    train_lora: TrainLora,
    same_tensors: SameTensors,
    photographs: Path,
    tmp_path: Path,
) -> None:
    # What is encoded once need not be encoded after each kill; a killed cache has its own test.
    quick = {
        "train_data_dir": str(shutil.copytree(photographs, tmp_path / "photographs")),
        "max_train_steps": STEPS,
        "network_train_unet_only": True,
        "cache_latents_to_disk": True,
        "cache_text_encoder_outputs_to_disk": True,
        "plugin": None,
    }
    straight = train_lora(**quick)
    chosen = options(
        **quick,
        save_every_n_steps=1,
        save_last_n_steps=2,
        save_state=True,
        resume="latest",
    )
    folder = Path(chosen["output_dir"])
    # How long a start and a step take here, so that the instants fall on training and saving.
    for steps in (1, 2):
        started = time.monotonic()
        run = processes.Process(target=_train, args=({**chosen, "max_train_steps": steps},))
        run.start()
        run.join()
        assert run.exitcode == 0
    whole_start = time.monotonic() - started

    generator = random.Random(20)
    furthest = killed = 0
    while killed < KILLS:
        run = processes.Process(target=_train, args=(chosen,))
        run.start()
        run.join(generator.uniform(0.2, 1.5) * whole_start)
        if run.exitcode is None:
            run.kill()
            run.join()
            killed += 1
        else:
            assert run.exitcode == 0
            # Over before it was killed: everything once more.
            shutil.rmtree(folder)
            folder.mkdir()
            furthest = 0
        _assert_nothing_is_half_written(folder)
        reached = max((step for step, _ in complete_states(folder, "photo")), default=0)
        assert reached >= furthest, "a kill lost a state that was complete"
        furthest = reached

    last = processes.Process(target=_train, args=(chosen,))
    last.start()
    last.join()
    assert last.exitcode == 0
    assert same_tensors(load_file(folder / "photo.safetensors"), straight.tensors)
