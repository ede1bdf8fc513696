"""The flat tensor in which gradients are added up, without processes."""

from __future__ import annotations

import pytest
import torch

from sdxl_train.errors import TrainingError
from sdxl_train.exchange import FlatExchange


def parameters(*gradients: float | None) -> list[torch.Tensor]:
    """Parameters of two numbers each, with these gradients."""
    made = [torch.zeros(2, requires_grad=True) for _ in gradients]
    for parameter, value in zip(made, gradients, strict=True):
        parameter.grad = None if value is None else torch.full((2,), value)
    return made


def gradients(of: list[torch.Tensor]) -> list[float | None]:
    return [None if p.grad is None else float(p.grad[1]) for p in of]


def exchange(
    first: FlatExchange, second: FlatExchange, *of: list[torch.Tensor]
) -> tuple[int, torch.Tensor]:
    """Add up what two processes have; give the size of what was sent, and the sum of 1 and 2."""
    values = [[torch.tensor([1.0])], [torch.tensor([2.0])]]
    both = zip((first, second), of, values, strict=True)
    packed = [one.pack(own, said) for one, own, said in both]
    sums = packed[0] + packed[1]
    (total,) = first.unpack(sums.clone(), of[0], values[0])
    second.unpack(sums.clone(), of[1], values[1])
    return len(sums), total


def test_gradients_of_some_are_added_and_those_of_none_stay_none() -> None:
    one, other = parameters(1.0, None, None), parameters(2.0, 5.0, None)
    size, total = exchange(FlatExchange(), FlatExchange(), one, other)
    assert gradients(one) == gradients(other) == [3.0, 5.0, None]
    assert size == 3 * 2 + 3 + 1
    assert total.tolist() == [3.0]


def test_static_graph_sends_which_gradients_there_are_once() -> None:
    pair = FlatExchange(static=True), FlatExchange(static=True)
    sizes = []
    for _ in range(2):
        one, other = parameters(1.0, None), parameters(None, None)  # which had no sample
        sizes.append(exchange(*pair, one, other)[0])
        assert gradients(one) == gradients(other) == [1.0, None]
    assert sizes == [4 + 2 + 1, 4 + 1]


def test_static_graph_refuses_another_graph() -> None:
    pair = FlatExchange(static=True), FlatExchange(static=True)
    exchange(*pair, parameters(1.0, None), parameters(1.0, None))
    with pytest.raises(TrainingError, match="ddp_static_graph"):
        pair[0].pack(parameters(None, 1.0), [])


def test_bucket_view_leaves_gradients_in_the_summed_tensor() -> None:
    for views in (False, True):
        pair = FlatExchange(views=views), FlatExchange(views=views)
        one = parameters(1.0, 2.0)
        exchange(*pair, one, parameters(1.0, 2.0))
        assert one[0].grad is not None
        assert one[1].grad is not None
        storages = {p.grad.untyped_storage().data_ptr() for p in one if p.grad is not None}
        assert len(storages) == (1 if views else 2)
        assert gradients(one) == [2.0, 4.0]


def test_sixteen_bit_gradients_are_added_in_fp32() -> None:
    # 2056 is no bf16 number: with 8 bits, the next after 2048 is 2064.
    pair = [torch.zeros(1, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    for parameter, value in zip(pair, (2048.0, 8.0), strict=True):
        parameter.grad = torch.tensor([value], dtype=torch.bfloat16)
    packed = [FlatExchange().pack([parameter], []) for parameter in pair]
    assert packed[0].dtype == torch.float32
    assert float((packed[0] + packed[1])[0]) == 2056.0
