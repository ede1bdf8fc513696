"""One adapted layer: dropouts, and precision on bf16 weights."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdxl_train import Adapter, Part
from sdxl_train_lycoris.networks import Kohya

ALGORITHMS = ["lora", "loha", "lokr"]


class CLIPMLP(nn.Module):
    """A block that presets name, with one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 64, bias=False)


@pytest.fixture
def layer() -> nn.Linear:
    """Give a frozen layer whose output is zero for inputs that sum to zero."""
    layer = CLIPMLP().fc1.requires_grad_(requires_grad=False)
    layer.weight.fill_(100.0)
    return layer


def attach(layer: nn.Linear, **options: Any) -> Adapter:
    """Attach a network with random factors."""
    root = nn.Module()
    root.mlp = CLIPMLP()
    root.mlp.fc1 = layer
    part = Part(
        name="te1",
        title="te1",
        group="textencoder",
        prefix="lora_te1",
        module=root,
        file_names={"mlp.fc1": "text_model_mlp_fc1"},
    )
    model: Any = SimpleNamespace(parts=(part,), denoiser=None)
    torch.manual_seed(0)
    adapter = Kohya(**({"network_dim": 4, "network_alpha": 4.0} | options)).build(model)
    for group in adapter.groups():
        for parameter in group.parameters:
            nn.init.normal_(parameter, std=0.2)
    return adapter


def zero_sum_input(rows: int = 3) -> Tensor:
    """Give an input of which every row sums to zero, exactly in bf16."""
    half = torch.randint(-8, 8, (rows, 8), generator=torch.Generator().manual_seed(1)).float()
    return torch.cat([half, -half], dim=1)


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("bypass", [True, False])
def test_dropout_drops_outputs_of_the_delta(layer: nn.Linear, algo: str, bypass: bool) -> None:
    x = zero_sum_input(rows=20)
    adapter = attach(layer, algo=algo, bypass_mode=bypass)
    whole = layer(x)
    adapter.detach()
    attach(layer, algo=algo, bypass_mode=bypass, dropout=0.25)
    shares = (layer(x) / whole).detach()
    dropped = shares == 0
    assert 0.15 < dropped.float().mean() < 0.35
    torch.testing.assert_close(shares[~dropped], torch.full_like(shares[~dropped], 1 / 0.75))


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("scaled", [True, False])
def test_rank_dropout_drops_rows_of_the_delta(layer: nn.Linear, algo: str, scaled: bool) -> None:
    x = zero_sum_input()
    adapter = attach(layer, algo=algo)
    whole = layer(x)
    adapter.detach()
    attach(layer, algo=algo, rank_dropout=0.5, rank_dropout_scale=scaled)
    shares = (layer(x) / whole).detach()
    kept = shares[0] != 0
    assert 0.2 < kept.float().mean() < 0.8
    share = 1 / kept.float().mean() if scaled else torch.tensor(1.0)
    torch.testing.assert_close(shares, (kept * share).expand_as(shares), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_module_dropout_drops_the_whole_delta(layer: nn.Linear, algo: str) -> None:
    x = zero_sum_input()
    adapter = attach(layer, algo=algo)
    whole = layer(x)
    adapter.detach()
    attach(layer, algo=algo, module_dropout=0.5)
    outputs = [layer(x) for _ in range(40)]
    dropped = [not output.any() for output in outputs]
    assert 8 < sum(dropped) < 32
    assert all(torch.equal(o, whole) for o, d in zip(outputs, dropped, strict=True) if not d)


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("bypass", [True, False])
def test_small_deltas_survive_bf16_weights(layer: nn.Linear, algo: str, bypass: bool) -> None:
    # Beside a weight of 100, bf16 knows no delta below 0.25.
    x = zero_sum_input()
    adapter = attach(layer, algo=algo, bypass_mode=bypass)
    exact = layer(x)
    layer.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        live = layer(x)
    assert live.dtype == torch.bfloat16
    torch.testing.assert_close(live.float(), exact, rtol=0.03, atol=0.03 * exact.abs().max().item())
    live.float().sum().backward()
    (group,) = adapter.groups()
    assert all(p.dtype == torch.float32 and p.grad is not None for p in group.parameters)
    assert layer.weight.grad is None


def test_library_stays_quiet_and_keeps_its_level(
    layer: nn.Linear, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("LyCORIS")
    before = logger.level
    attach(layer, algo="lokr", network_dim=99, dropout=0.5)
    assert capsys.readouterr() == ("", "")
    assert logger.level == before


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_multiplier_and_modes_act_on_every_layer(layer: nn.Linear, algo: str) -> None:
    x = zero_sum_input()
    adapter = attach(layer, algo=algo, dropout=0.5)
    for module in adapter.modules():
        module.eval()
    whole = layer(x)
    assert torch.equal(whole, layer(x))
    # The base output of these inputs is zero.
    adapter.multiplier = 0.5
    assert torch.equal(layer(x), whole / 2)
    adapter.multiplier = 0.0
    assert not layer(x).any()
