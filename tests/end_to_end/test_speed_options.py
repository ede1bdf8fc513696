"""Options that change how fast a step is, and nothing of what it learns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.end_to_end.conftest import CheckRun


@pytest.mark.parametrize(
    ("option", "value"),
    [("gradient_accumulation_steps", 2), ("full_bf16", True)],
)
def test_cuda_graphs_are_refused_where_they_would_write_over_what_is_needed(
    option: str, value: object, check_run: CheckRun
) -> None:
    graphs = {"torch_compile": True, "dynamo_mode": "reduce-overhead"}
    problems, _ = check_run(**graphs, mixed_precision="bf16", **{option: value})
    assert any(text.startswith(f"option {option}: does not go with CUDA") for text in problems)
    # Nor has this machine what they need.
    assert any(text.startswith("option dynamo_mode: replays CUDA graphs") for text in problems)


def test_a_level_that_the_model_has_not_is_refused(check_run: CheckRun) -> None:
    (problem,), _ = check_run(gradient_checkpointing=True, checkpoint_levels=[1, 3])
    assert "levels 0 to 2" in problem
