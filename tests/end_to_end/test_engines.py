"""DeepSpeed and FSDP: what of their options acts, what is refused, and how DeepSpeed trains."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from sdxl_train.process_options import ProcessOptions
from sdxl_train.zero import engine_configuration
from tests.end_to_end.conftest import begin_forked

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext
    from pathlib import Path

    from tests.end_to_end.conftest import CheckRun, MakeOptions

installed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra deepspeed")


def test_options_make_the_configuration_of_deepspeed() -> None:
    options = ProcessOptions(deepspeed=True, offload_optimizer_device="cpu")
    made = engine_configuration(options, max_grad_norm=0.5, trained=1001)
    zero = made.pop("zero_optimization")
    assert zero["stage"] == 2
    assert zero["offload_optimizer"]["device"] == "cpu"
    assert zero["offload_param"]["device"] == "none"
    # What is set aside for travelling is no larger than what travels; DeepSpeed wants it even.
    assert (zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (1001, 1002)
    assert made["gradient_clipping"] == 0.5
    assert made["gradient_accumulation_steps"] == 1
    # accelerate would put DeepSpeed's Adam in the place of any optimizer.
    assert made["zero_force_ds_cpu_optimizer"] is False
    first = engine_configuration(ProcessOptions(deepspeed=True, zero_stage=1), 1.0, 10)
    assert first["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize(
    ("changes", "place", "fault"),
    [
        ({"zero_stage": 2}, "zero_stage", "has no effect without --deepspeed"),
        ({"offload_optimizer_device": "cpu"}, "offload_optimizer_device", "without --deepspeed"),
        ({"offload_param_device": "cpu"}, "offload_param_device", "without --fsdp, or"),
        ({"deepspeed": True, "zero_stage": 0}, "zero_stage", "0 spreads nothing"),
        ({"deepspeed": True, "zero_stage": 4}, "zero_stage", "4"),
        ({"deepspeed": True, "optimizer_type": "Adafactor"}, "deepspeed", "Adafactor"),
        ({"deepspeed": True, "optimizer_type": "Adagrad"}, "deepspeed", "Adagrad"),
        ({"deepspeed": True, "fused_backward_pass": True}, "deepspeed", "fused_backward_pass"),
        (
            {"deepspeed": True, "full_bf16": True, "mixed_precision": "bf16"},
            "deepspeed",
            "full_bf16",
        ),
        ({"deepspeed": True, "offload_optimizer_device": "nvme"}, "offload_optimizer", "NVMe"),
        ({"deepspeed": True, "zero3_init_flag": True}, "zero3_init_flag", "mapped from its file"),
        ({"zero3_save_16bit_model": True}, "zero3_save_16bit_model", "saved whole"),
        ({"fp16_master_weights_and_gradients": True}, "fp16_master", "small updates are lost"),
        ({"fsdp": True, "fp8_base": True}, "fp8_base", "spread over processes"),
        ({"fsdp": True, "torch_compile": True}, "torch_compile", "spread over processes"),
        ({"fsdp": True, "channels_last": True}, "channels_last", "spread over processes"),
    ],
)
def test_what_cannot_have_its_effect_is_refused(
    changes: dict[str, Any], place: str, fault: str, check_run: CheckRun
) -> None:
    problems, _ = check_run(**changes)
    assert any(place in problem and fault in problem for problem in problems), problems


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="needs deepspeed not to be there")
def test_missing_package_is_named(check_run: CheckRun) -> None:
    (problem,), _ = check_run(deepspeed=True)
    assert "needs the package deepspeed" in problem
    assert 'pip install "sdxl-train[deepspeed]"' in problem


def train_as_one_of_two(index: int, meeting: Path, runs: list[dict[str, Any]]) -> None:
    """Train every run in turn, as process ``index``."""
    import sdxl_train

    os.environ.update(RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    begin_forked()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=index, world_size=2
    )
    for options in runs:
        sdxl_train.train(options)
    # DeepSpeed keeps a hold on what it is given.
    os._exit(0)


@installed
def test_deepspeed_trains_as_processes_do_without_it(
    options: MakeOptions, processes: ForkServerContext, tmp_path: Path
) -> None:
    descent = {"optimizer_type": "SGD", "learning_rate": 0.1, "train_batch_size": 1}
    # Two groups, batches too small for two, parts of the network left out, weights limited.
    full = {
        **descent,
        "max_train_steps": 6,
        "gradient_accumulation_steps": 2,
        "network_args": ["loraplus_lr_ratio=4"],
        "scale_weight_norms": 0.1,
        "lr_scheduler": "cosine",
    }
    adam = {**full, "optimizer_type": "AdamW", "learning_rate": 1e-4}
    saving = {"save_every_n_steps": 3, "save_state": True}
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "stage-1": {"deepspeed": True, "zero_stage": 1},
        "stage-2": {"deepspeed": True},
        "stage-3": {"deepspeed": True, "zero_stage": 3, "offload_param_device": "cpu"},
        "offload": {"deepspeed": True, "offload_optimizer_device": "cpu"},
    }
    runs = {name: options(**full, **kind) for name, kind in kinds.items()}
    for name in ("plain", "stage-2"):
        runs[f"{name} adam"] = options(**adam, **saving, **kinds[name])
    state = "photo-step00000003-state"
    for first, second in (("plain", "stage-2"), ("stage-2", "plain"), ("stage-2", "stage-2")):
        resume = f"{runs[f'{first} adam']['output_dir']}/{state}"
        runs[f"{first} to {second}"] = options(**adam, **kinds[second], resume=resume)

    pair = [
        processes.Process(
            target=train_as_one_of_two, args=(i, tmp_path / "meeting", list(runs.values()))
        )
        for i in range(2)
    ]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
    assert [process.exitcode for process in pair] == [0, 0]
    trained = {
        name: load_file(f"{run['output_dir']}/photo.safetensors") for name, run in runs.items()
    }

    def difference(first: str, second: str) -> float:
        pairs = [(trained[first][name], trained[second][name]) for name in trained[first]]
        return max(float((one - two).abs().max()) for one, two in pairs)

    for name in kinds:
        assert difference("plain", name) < 1e-6, name
    # Of six steps of 1e-4; Adam divides by gradients that are only rounding.
    assert difference("plain adam", "stage-2 adam") < 2e-5
    assert difference("stage-2 adam", "stage-2 to stage-2") == 0
    for name in ("plain to stage-2", "stage-2 to plain"):
        assert difference("plain adam", name) < 2e-5


@installed
def test_one_process_offloads_too(options: MakeOptions, processes: ForkServerContext) -> None:
    chosen = options(
        deepspeed=True, offload_optimizer_device="cpu", mixed_precision="bf16", max_train_steps=2
    )
    process = processes.Process(target=train_alone, args=(chosen,))
    process.start()
    process.join()
    assert process.exitcode == 0


def train_alone(options: dict[str, Any]) -> None:
    """Train in a process that nobody launched."""
    import sdxl_train

    begin_forked()
    sdxl_train.train(options)
    os._exit(0)
