"""What accelerate's launcher says to the processes that it starts, and what becomes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from sdxl_train.errors import UserError
from sdxl_train.preflight import prepare
from sdxl_train.settings import from_mapping

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdxl_train.config import RunConfig
    from tests.end_to_end.conftest import CheckRun, MakeOptions

COMMON = "--num_machines 1 --num_cpu_threads_per_process 1 --main_process_port 0"


@pytest.fixture
def launched_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Set the environment that ``accelerate launch`` with these words gives to a process."""

    def launch(words: str) -> None:
        parser = launch_command_parser()
        options = parser.parse_args([*COMMON.split(), *words.split(), "-m", "sdxl_train"])
        options.use_cpu = options.cpu
        options.dynamo_backend = options.dynamo_backend or "no"
        options.mixed_precision = options.mixed_precision or "no"
        if options.multi_gpu:
            environment = prepare_multi_gpu_env(options)
        else:
            _, environment = prepare_simple_launcher_cmd_env(options)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return launch


@pytest.fixture
def checked(options: MakeOptions) -> Callable[..., RunConfig]:
    def check(**changes: object) -> RunConfig:
        return prepare(from_mapping(options(**changes))).config

    return check


def test_one_process_where_several_were_asked_for_is_refused(
    launched_by: Callable[[str], None], check_run: CheckRun
) -> None:
    launched_by("--cpu --num_processes 2")
    (problem,), _ = check_run()
    assert "started only this one" in problem
    assert "add --multi_gpu" in problem


def test_one_process_where_one_was_asked_for_is_not(
    launched_by: Callable[[str], None], check_run: CheckRun
) -> None:
    launched_by("--cpu --num_processes 1")
    assert check_run()[0] == []


def test_settings_of_accelerate_serve_as_options(
    launched_by: Callable[[str], None], checked: Callable[..., RunConfig]
) -> None:
    launched_by(
        "--multi_gpu --num_processes 2 --mixed_precision bf16 --dynamo_backend eager "
        "--dynamo_use_dynamic"
    )
    config = checked()
    assert config.training.mixed_precision == "bf16"
    resolved = config.options()
    assert resolved["torch_compile"]["value"] is True
    assert resolved["dynamo_use_dynamic"]["value"] is True
    assert resolved["dynamo_backend"] == {"value": "eager", "origin": "accelerate's configuration"}


def test_own_options_come_first_and_differences_are_told(
    launched_by: Callable[[str], None], check_run: CheckRun, checked: Callable[..., RunConfig]
) -> None:
    launched_by("--cpu --num_processes 1 --mixed_precision bf16 --dynamo_mode max-autotune")
    assert checked(mixed_precision="no").training.mixed_precision == "no"
    told = "\n".join(check_run(mixed_precision="no")[1])
    assert "accelerate's configuration says mixed_precision bf16; what counts is" in told
    assert "dynamo_mode has no effect without its dynamo_backend" in told
    assert "says mixed_precision" not in "\n".join(check_run(mixed_precision="bf16")[1])


def test_precision_that_is_not_offered_is_refused(
    monkeypatch: pytest.MonkeyPatch, checked: Callable[..., RunConfig]
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match="accelerate's configuration"):
        checked()


def test_one_process_has_no_use_for_options_of_several(check_run: CheckRun) -> None:
    _, told = check_run(ddp_static_graph=True, ddp_gradient_as_bucket_view=True, ddp_timeout=5)
    assert sum("has no effect with one process" in text for text in told) == 3


def test_engines_of_accelerate_are_options_of_the_run(
    monkeypatch: pytest.MonkeyPatch, check_run: CheckRun
) -> None:
    # As its launcher sets them of `use_fsdp`, and of `use_deepspeed` with these settings.
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    problems, told = check_run()
    assert problems == []
    assert any("use_fsdp has no effect with one process" in text for text in told)
    assert any("fsdp_offload_params alone has an effect" in text for text in told)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.delenv("FSDP_OFFLOAD_PARAMS")
    for name, value in (
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0"),
        ("ACCELERATE_GRADIENT_CLIPPING", "0.5"),
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds.json"),
    ):
        monkeypatch.setenv(name, value)
    problems, _ = check_run()
    assert any("names a configuration file of DeepSpeed" in problem for problem in problems)
    assert any("accelerate's configuration: 0 spreads nothing" in text for text in problems)


def test_gradient_clipping_of_accelerate_serves(
    monkeypatch: pytest.MonkeyPatch, checked: Callable[..., RunConfig]
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "0.5")
    assert checked().training.max_grad_norm == 0.5
    assert checked(max_grad_norm=2.0).training.max_grad_norm == 2.0
