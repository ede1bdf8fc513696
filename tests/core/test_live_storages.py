"""What lives at once, against formulas for a small network."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sdxl_train.live_storages import LiveStorages

ROWS, WIDTH, HIDDEN = 64, 256, 1024
FLOAT = 4
CPU = torch.device("cpu")


def test_forward_backward_and_adam_hold_what_the_formulas_say() -> None:
    live = LiveStorages(CPU)
    with FakeTensorMode():
        first, last = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)
        weights = 2 * WIDTH * HIDDEN * FLOAT
        assert live.add([first.weight, last.weight, first.weight]) == weights
        optimizer = torch.optim.SGD([first.weight, last.weight], lr=0.1, momentum=0.9)
        with live:
            x = torch.zeros(ROWS, WIDTH)
            y = last(torch.relu(first(x)))
            # The sum before relu is gone; relu keeps what it gives, and so does the last layer.
            inputs, hidden = ROWS * WIDTH * FLOAT, ROWS * HIDDEN * FLOAT
            assert live.now == weights + inputs + hidden + inputs
            assert live.peak == weights + inputs + 2 * hidden
            live.begin()
            y.sum().backward()
            assert weights * 2 < live.now < weights * 2 + 3 * inputs
            # Where both gradients of weights are there, those of the hidden layer are too.
            assert live.peak >= weights * 2 + hidden
            optimizer.step()
            optimizer.zero_grad()
            del x, y
            assert live.now == weights * 2


def test_temporaries_count_while_they_live_and_views_never() -> None:
    live = LiveStorages(CPU)
    with live:
        x = torch.zeros(1000)
        assert live.now == 4000
        total = (x[:500] + 1).sum() + x.view(10, 100)[0, 0]
        assert live.peak >= 4000 + 2000
        assert live.now == 4000 + total.nbytes
        del x
        assert live.now == total.nbytes


def test_tensors_of_another_device_do_not_count() -> None:
    live = LiveStorages(CPU)
    with live:
        elsewhere = torch.zeros(1000, device="meta")
    assert elsewhere.nbytes == 4000
    assert live.peak == 0


def test_a_number_that_is_read_of_a_tensor_without_data_is_one() -> None:
    with FakeTensorMode(), LiveStorages(CPU):
        loss = torch.randn(3).sum()
        assert loss.item() == 1.0
        assert bool(torch.isfinite(loss)) is True
        assert int(torch.randint(0, 9, ())) == 1
        assert torch.tensor(5).item() == 5  # this one is known
