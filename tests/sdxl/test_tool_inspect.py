"""``inspect`` against norms of the formula and a file whose weights were changed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from sdxl_train import TensorEntry, write_tensors
from sdxl_train.cli import main

if TYPE_CHECKING:
    from pathlib import Path

Q = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
K = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k"


def test_a_network_is_described_and_a_changed_one_betrays_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {}
    for name, rank in ((Q, 4), (K, 2)):
        tensors[f"{name}.lora_up.weight"] = torch.randn(64, rank)
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, 64)
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    entries = {n: TensorEntry(t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    write_tensors(path, entries, tensors.__getitem__, {"ss_seed": "4"})

    assert main(["inspect", str(path), "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    square = sum(
        (tensors[f"{n}.lora_up.weight"] @ tensors[f"{n}.lora_down.weight"] / rank).norm() ** 2
        for n, rank in ((Q, 4), (K, 2))
    )
    assert found["kinds"] == {"LoRA": 2}
    assert found["ranks"] == {"2": 1, "4": 1}
    assert found["norms"] == {"input_blocks.4": pytest.approx(float(square) ** 0.5, rel=1e-5)}
    assert found["metadata"]["ss_seed"] == "4"
    assert found["hash"] == "right"

    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    assert main(["inspect", str(path)]) == 0
    assert "hash of the weights: wrong" in capsys.readouterr().out


def test_what_is_no_network_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"")

    assert main(["inspect", str(path)]) == 2
    assert "is empty" in capsys.readouterr().err
