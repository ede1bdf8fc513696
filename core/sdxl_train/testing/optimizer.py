"""The contract of optimizers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from sdxl_train.components import Optimizer
from sdxl_train.testing.contract import Contract, untouched_process
from sdxl_train.testing.functions import normal
from sdxl_train.testing.state_files import through_a_file

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn
    from torch.optim import Optimizer as TorchOptimizer

    from sdxl_train.testing.state_files import Pair

_FEW = 3
"""Steps after which momenta and counters are no longer what they began as."""


class OptimizerContract(Contract[Optimizer]):
    """An optimizer that descends, obeys the rates of its groups, and can be resumed."""

    learning_rate: ClassVar[float] = 0.1
    """The rate of these checks; 1 is usual where the optimizer finds its own."""
    num_steps: ClassVar[int] = 100
    """Steps in which it must get rid of 90% of the loss of a quadratic."""
    shapes: ClassVar[tuple[tuple[int, ...], ...]] = ((4, 3), (5,), (2, 3, 1, 1), ())
    """Shapes of the parameters: matrices, vectors, convolutions and scalars occur in networks."""

    def make(self, **changes: Any) -> Optimizer:
        """Make the component; its rate is :attr:`learning_rate`."""
        return super().make(**{"learning_rate": self.learning_rate, **changes})

    def test_it_converges_on_a_quadratic(self) -> None:
        """Half the squared distance to a point falls below a tenth."""
        problem = Quadratic(self, rates=(self.learning_rate, self.learning_rate))
        before = problem.loss().item()
        problem.descend(self.num_steps)
        after = problem.loss().item()
        assert after < before / 10, f"in {self.num_steps} steps the loss went {before} -> {after}"

    def test_groups_stay_as_they_are_given(self) -> None:
        """The groups keep order, name, parameters and rate: logs and schedules rely on them."""
        problem = Quadratic(self, rates=self._two_rates())
        assert isinstance(problem.optimizer, torch.optim.Optimizer)
        found = [
            (group.get("name"), group["lr"], [id(parameter) for parameter in group["params"]])
            for group in problem.optimizer.param_groups
        ]
        given = [
            (f"group {number}", rate, [id(parameter) for parameter in parameters])
            for number, (rate, parameters) in enumerate(
                zip(self._two_rates(), problem.groups, strict=True)
            )
        ]
        assert found == given

    def test_group_rates_are_honoured(self) -> None:
        """A group whose rate is 0 stays; one that has a rate moves."""
        if self.component.own_schedule:
            pytest.skip("it sets its rates itself")
        both = (0.0, 0.0) if self.component.single_lr else (self.learning_rate, 0.0)
        problem = Quadratic(self, rates=both)
        problem.descend(_FEW)
        for rate, moved in zip(both, problem.moved(), strict=True):
            assert moved == (rate > 0), f"a group of rate {rate} {'moves' if moved else 'stays'}"

    def test_rates_can_change_at_every_step(self) -> None:
        """A schedule that sets the rates to 0 stops all movement."""
        if self.component.own_schedule:
            pytest.skip("it sets its rates itself")
        problem = Quadratic(self, rates=(self.learning_rate, self.learning_rate))
        problem.descend(_FEW)
        for group in problem.optimizer.param_groups:
            group["lr"] = 0.0
        problem.mark()
        problem.descend(_FEW)
        assert problem.moved() == [False, False], "it moves at a rate of 0"

    def test_state_goes_through_files_bit_for_bit(self, tmp_path: Path) -> None:
        """Steps after a restored state are exactly those of a run that never stopped."""
        problem = Quadratic(self, rates=(self.learning_rate, self.learning_rate))
        problem.descend(_FEW)
        other = Quadratic(self, rates=(self.learning_rate, self.learning_rate))
        other.take_values_of(problem)
        through_a_file(tmp_path, problem.pair, other.pair)
        for _ in range(_FEW):
            problem.descend(1)
            other.descend(1)
            assert all(
                torch.equal(one, two)
                for one, two in zip(problem.parameters, other.parameters, strict=True)
            ), "it goes another way after its state was restored"

    def test_parameters_without_gradient_stay(self) -> None:
        """A module that took no part in a step has no gradient, and is left alone."""
        problem = Quadratic(self, rates=(self.learning_rate, self.learning_rate))
        problem.descend(_FEW)
        idle = problem.parameters[0]
        before = idle.detach().clone()
        problem.backward()
        idle.grad = None
        problem.optimizer.step()
        assert torch.equal(idle, before), "a parameter without gradient moves"

    def test_same_start_gives_the_same_steps(self) -> None:
        """Nothing but parameters and gradients decides a step."""
        ends = []
        for _ in range(2):
            problem = Quadratic(self, rates=(self.learning_rate, self.learning_rate))
            problem.descend(_FEW)
            ends.append(torch.cat([parameter.flatten() for parameter in problem.parameters]))
        assert torch.equal(*ends)

    def test_process_is_left_alone(self) -> None:
        """Global generators, default dtype, threads and the like stay as they are."""
        with untouched_process():
            Quadratic(self, rates=(self.learning_rate, self.learning_rate)).descend(_FEW)

    def test_modes_are_as_declared(self) -> None:
        """It has ``train()`` and ``eval()`` if, and only if, ``train_eval_modes`` says so."""
        problem = Quadratic(self, rates=(self.learning_rate, self.learning_rate))
        optimizer: Any = problem.optimizer
        has_modes = callable(getattr(optimizer, "train", None)) and callable(
            getattr(optimizer, "eval", None)
        )
        assert has_modes == self.component.train_eval_modes, (
            f"train_eval_modes is {self.component.train_eval_modes}, but it has "
            f"{'' if has_modes else 'no '}train() and eval()"
        )
        if has_modes:
            optimizer.train()
            problem.descend(_FEW)
            before = [parameter.detach().clone() for parameter in problem.parameters]
            optimizer.eval()
            optimizer.train()
            for parameter, value in zip(problem.parameters, before, strict=True):
                torch.testing.assert_close(parameter.detach(), value, rtol=1e-4, atol=1e-5)

    def test_fused_backward_is_true_if_declared(self) -> None:
        """Stepping parameter by parameter, as inside a backward pass, gives the same weights."""
        if not self.component.fused_backward:
            return
        rates = (self.learning_rate, self.learning_rate)
        joint, single = Quadratic(self, rates=rates), Quadratic(self, rates=rates)
        for _ in range(_FEW):
            joint.descend(1)
            single.backward()
            gradients = [parameter.grad for parameter in single.parameters]
            for chosen, gradient in zip(single.parameters, gradients, strict=True):
                single.optimizer.zero_grad(set_to_none=True)
                chosen.grad = gradient
                single.optimizer.step()
            single.optimizer.zero_grad(set_to_none=True)
        for one, two in zip(joint.parameters, single.parameters, strict=True):
            torch.testing.assert_close(one, two, msg="stepping one by one gives other weights")

    def test_elementwise_is_true_if_declared(self) -> None:
        """Stepping halves of a flattened group gives the same weights."""
        if not self.component.elementwise:
            return
        rates = (self.learning_rate, self.learning_rate)
        whole, halved = Quadratic(self, rates=rates), Quadratic(self, rates=rates)
        flat = torch.cat([parameter.detach().flatten() for parameter in halved.parameters])
        halves = [torch.nn.Parameter(half.clone()) for half in flat.tensor_split(2)]
        rate = self.learning_rate
        optimizer = self.make().build(
            [{"name": str(i), "lr": rate, "params": [half]} for i, half in enumerate(halves)]
        )
        sizes = [parameter.numel() for parameter in whole.parameters]
        for _ in range(_FEW):
            pieces = torch.cat([half.detach() for half in halves]).split_with_sizes(sizes)
            for parameter, piece in zip(halved.parameters, pieces, strict=True):
                parameter.detach().copy_(piece.view_as(parameter))
            halved.backward()
            gradients = torch.cat(
                [p.grad.flatten() for p in halved.parameters if p.grad is not None]
            )
            halved.optimizer.zero_grad(set_to_none=True)
            for half, gradient in zip(halves, gradients.tensor_split(2), strict=True):
                half.grad = gradient.clone()
            optimizer.step()
            whole.descend(1)
        stepped = torch.cat([half.detach() for half in halves]).split_with_sizes(sizes)
        for one, two in zip(whole.parameters, stepped, strict=True):
            torch.testing.assert_close(
                one.detach().flatten(), two, msg="stepping flattened halves gives other weights"
            )

    def _two_rates(self) -> tuple[float, float]:
        other = 1.0 if self.component.single_lr else 0.5
        return self.learning_rate, other * self.learning_rate


class Quadratic:
    """Half the squared distance of some parameters, in two groups, to a fixed point."""

    def __init__(self, contract: OptimizerContract, *, rates: tuple[float, float]) -> None:
        shapes = contract.shapes
        self.groups: list[list[nn.Parameter]] = [
            [
                torch.nn.Parameter(normal(*shape, seed=10 * number + position))
                for position, shape in enumerate(shapes)
            ]
            for number in (1, 2)
        ]
        self.target = [normal(*p.shape, seed=50 + i) for i, p in enumerate(self.parameters)]
        self.optimizer: TorchOptimizer = contract.make().build(
            [
                {"params": parameters, "lr": rate, "name": f"group {number}"}
                for number, (parameters, rate) in enumerate(zip(self.groups, rates, strict=True))
            ]
        )
        if contract.component.train_eval_modes:
            self.optimizer.train()  # type: ignore[attr-defined]
        self.mark()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters, in order."""
        return [parameter for group in self.groups for parameter in group]

    @property
    def pair(self) -> Pair:
        """The optimizer and a schedule, which a state always holds."""
        return self.optimizer, LambdaLR(self.optimizer, lambda step: 1.0)

    def loss(self) -> Tensor:
        """Give the loss."""
        pairs = zip(self.parameters, self.target, strict=True)
        return torch.stack([(p - t).square().sum() / 2 for p, t in pairs]).sum()

    def backward(self) -> None:
        """Leave the gradient in the parameters."""
        torch.autograd.backward(self.loss())

    def descend(self, steps: int) -> None:
        """Take steps as the loop does."""
        for _ in range(steps):
            self.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def take_values_of(self, other: Quadratic) -> None:
        """Copy the values of the parameters."""
        for mine, theirs in zip(self.parameters, other.parameters, strict=True):
            mine.data.copy_(theirs.data)

    def mark(self) -> None:
        """Remember where the parameters are, for :meth:`moved`."""
        self._before = [[p.detach().clone() for p in group] for group in self.groups]

    def moved(self) -> list[bool]:
        """Tell of each group whether any of its parameters has moved since :meth:`mark`."""
        return [
            any(not torch.equal(p, old) for p, old in zip(group, before, strict=True))
            for group, before in zip(self.groups, self._before, strict=True)
        ]
