"""ZeRO by DeepSpeed (Rajbhandari et al. 2020): each process keeps a part of the optimizer's state.

The base model stays outside of DeepSpeed's engine, which is given what trains, and for each step
the gradients that this process has come to. It adds up and deals out those, clips them, steps this
process's part of all weights, and gathers the others' parts. States are put together for files, in
the form of the plain optimizer: a run with DeepSpeed goes on from one without it, and back, with
any number of processes.
"""

from __future__ import annotations

import os
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from sdxl_train.errors import TrainingError
from sdxl_train.libraries import quiet
from sdxl_train.update import Update

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from accelerate import Accelerator
    from torch import Tensor
    from torch.nn import Parameter

    from sdxl_train.config import RunConfig
    from sdxl_train.ranks import Ranks

_LARGEST_BUCKET = 100_000_000
"""Numbers that travel at once at most; DeepSpeed sets the room for them aside in each step."""


class ZeroUpdate(Update):
    """Updates of which each process computes a part; the arguments are those of :class:`Update`."""

    whole = False

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        ranks: Ranks,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[Parameter],
    ) -> None:
        super().__init__(config, accelerator, ranks, optimizer, parameters)
        self.optimizer = cast("Any", _Steps(self))
        self._options = config.processes
        self._scaler: torch.amp.GradScaler | None = accelerator.scaler
        self._engine: Any = None
        self._shapes = [[p.shape for p in group["params"]] for group in optimizer.param_groups]
        self._norm = torch.zeros(())
        # The gradient scaler asks one optimizer whether its gradients are finite: that of the norm.
        self._witness = torch.optim.SGD([torch.zeros(1, device=accelerator.device)], lr=0.0)
        self._collected: dict[str, Any] = {}

    def why_at_once(self) -> str | None:
        """Say why each step must be known to be finite before it is taken."""
        return "DeepSpeed cannot hold a step back"

    def begin(self, generator: Callable[[int], torch.Generator]) -> None:
        """Hand what trains over to DeepSpeed, with the optimizer's state as it is now."""
        del generator
        whole = self.bare.state_dict()
        with _quiet():
            self._engine = self._make_engine()
        self.bare.state.clear()  # of whole parameters, which it steps no more
        for number, shapes in enumerate(self._shapes):
            weights = self.parameters[sum(map(len, self._shapes[:number])) :][: len(shapes)]
            if not torch.equal(self._part(weights, number), self._own(number).detach()):
                raise TrainingError(
                    "this version of DeepSpeed deals weights out in another way than is expected "
                    "here: tell the authors of sdxl-train, and leave out --deepspeed"
                )
        self._take(whole)

    def _make_engine(self) -> Any:
        os.environ.setdefault("DS_ACCELERATOR", self.accelerator.device.type)
        os.environ.setdefault("LOCAL_RANK", "0")  # of a process that nobody launched
        import deepspeed

        if not dist.is_initialized():
            dist.init_process_group(store=HashStore(), rank=0, world_size=1)
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        sizes = [shape.numel() for shapes in self._shapes for shape in shapes]
        max_norm = self.config.training.max_grad_norm
        engine, *_ = deepspeed.initialize(
            model=torch.nn.ParameterList(self.parameters),
            optimizer=self.bare,
            config=engine_configuration(self._options, max_norm, sum(sizes)),
        )
        return engine

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar loss to those that are there, unseen by DeepSpeed.

        Which would send them at once, in the order in which they come; with module dropout that
        order differs between processes.
        """
        scaled = loss if self._scaler is None else self._scaler.scale(loss)
        gradients = torch.autograd.grad(scaled, self.parameters, allow_unused=True)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is not None:
                before = parameter.grad
                parameter.grad = gradient if before is None else before + gradient

    def add_up(self, values: Sequence[Tensor]) -> Sequence[Tensor]:
        """Add up and deal out the gradients of all processes, and give the sums of ``values``."""
        factor = torch.full((), float(self.ranks.count), device=self.accelerator.device)
        if self._scaler is not None:
            factor /= self._scaler.scale(torch.ones_like(factor))
        for parameter in self.parameters:
            gradient = parameter.grad
            # DeepSpeed gives the mean of the processes' gradients.
            parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient * factor
        sums = self.ranks.add_up((), values)
        self.ranks.meet(self._deal_out)
        return sums

    def _deal_out(self) -> None:
        with _quiet(), self._engine.coalesce_grad_reduction():
            pass  # it sends what lies there when it is left, in the order of the parameters

    def clip(self) -> Tensor:
        """Give the norm of all gradients, an fp32 scalar; DeepSpeed clips by it as it steps."""
        self._norm = self.ranks.meet(self._engine.optimizer.scaled_global_norm).float()
        return self._norm

    def step(self) -> None:
        """Step this process's part, and take the others'. What is not finite is left out."""
        engine = self._engine
        # Weights may have been limited since the last step, and this process's part of them too.
        engine.optimizer.refresh_fp32_params()
        with _quiet():
            self.ranks.meet(engine.step)
        if self._scaler is not None:
            (witness,) = self._witness.param_groups[0]["params"]
            witness.grad = self._norm.to(witness.device).reshape(1)
            self._scaler.step(self._witness)
            self._scaler.update()

    def was_skipped(self) -> bool:
        """Tell whether the last step was left out."""
        return not self._engine.was_step_applied()

    def collect(self) -> None:
        """Put the optimizer's state together in the main process."""
        plain = self.bare.state_dict()
        state: dict[int, dict[str, Any]] = {}
        for number, shapes in enumerate(self._shapes):
            own, first = self._own(number), len(state)
            whole = {
                name: self._whole(value, shapes) if _is_like(value, own) else [value] * len(shapes)
                for name, value in self.bare.state.get(own, {}).items()
            }
            for index in range(len(shapes)):
                state[first + index] = {name: values[index] for name, values in whole.items()}
            plain["param_groups"][number]["params"] = list(range(first, first + len(shapes)))
        self._collected = {**plain, "state": {i: each for i, each in state.items() if each}}

    def state_dict(self) -> dict[str, Any]:
        """Give what was collected last."""
        collected, self._collected = self._collected, {}
        return collected

    def _own(self, group: int) -> Tensor:
        """Give this process's part of what a group trains: fp32 [n], n alike in all processes."""
        (own,) = self.bare.param_groups[group]["params"]
        return cast("Tensor", own)

    def _part(self, tensors: Sequence[Tensor], group: int) -> Tensor:
        """Give this process's part of tensors that are shaped as a group's parameters."""
        own = self._own(group)
        flat = torch.cat([tensor.detach().flatten().to(own) for tensor in tensors])
        padded = own.new_zeros(len(own) * self.ranks.count)
        padded[: len(flat)] = flat
        return padded[len(own) * self.ranks.index :][: len(own)]

    def _whole(self, part: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor | None]:
        """Give the main process the tensors of a group that this is a part of; the others none."""
        parts = self.ranks.to_main(part.detach().cpu())
        if parts is None:
            return [None] * len(shapes)
        sizes = [shape.numel() for shape in shapes]
        tensors = torch.cat(parts)[: sum(sizes)].split_with_sizes(sizes)
        return [tensor.view(shape) for tensor, shape in zip(tensors, shapes, strict=True)]

    def _take(self, whole: Mapping[str, Any]) -> None:
        """Take this process's part of the whole state of an optimizer."""
        state: dict[int, dict[str, Any]] = {}
        first = 0
        for number, shapes in enumerate(self._shapes):
            found = [whole["state"].get(first + index, {}) for index in range(len(shapes))]
            known: dict[str, Any] = next((each for each in found if each), {})
            state[number] = {}
            for name, example in known.items():
                values = [each.get(name) for each in found]
                if not _is_like(example, torch.empty(shapes[found.index(known)])):
                    state[number][name] = max(value for value in values if value is not None)
                    continue
                tensors = [
                    torch.zeros(shape) if value is None else value
                    for value, shape in zip(values, shapes, strict=True)
                ]
                state[number][name] = self._part(tensors, number)
            first += len(shapes)
        plain = self.bare.state_dict()
        self.bare.load_state_dict(
            {**plain, "state": {i: each for i, each in state.items() if each}}
        )


class _Steps:
    """The optimizer as the loop sees it."""

    def __init__(self, update: ZeroUpdate) -> None:
        self.step = update.step
        self.optimizer = update.bare
        self._parameters = update.parameters

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups, of which schedules set the rates."""
        return self.optimizer.param_groups

    def zero_grad(self, *, set_to_none: bool) -> None:
        """Forget what gradients are left."""
        assert set_to_none
        for parameter in self._parameters:
            parameter.grad = None


def engine_configuration(options: Any, max_grad_norm: float, trained: int) -> dict[str, Any]:
    """Give DeepSpeed's configuration, which accelerate's plugin makes of the options.

    Args:
        options: Of the run's processes.
        max_grad_norm: Norm to which gradients are clipped; 0 is none.
        trained: How many numbers train.
    """
    from accelerate.utils import DeepSpeedPlugin

    plugin = DeepSpeedPlugin(
        gradient_accumulation_steps=1,
        gradient_clipping=max_grad_norm,
        zero_stage=1 if options.zero_stage == 1 else 2,
        offload_optimizer_device=options.offload_optimizer_device or "none",
        offload_optimizer_nvme_path="none",
        offload_param_device="none",  # of ZeRO-3; here of FSDP, see sharding.py
        offload_param_nvme_path="none",
        zero3_init_flag=False,
        zero3_save_16bit_model=False,
    )
    configuration: dict[str, Any] = plugin.deepspeed_config
    del configuration["train_batch_size"]
    configuration |= {
        "train_micro_batch_size_per_gpu": 1,  # which only its statistics go by
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # or another optimizer would step than was chosen
    }
    bucket = min(trained, _LARGEST_BUCKET)
    configuration["zero_optimization"] |= {
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket + bucket % 2,
        "overlap_comm": False,
    }
    return configuration


def _is_like(value: object, tensor: Tensor) -> bool:
    """Tell whether a value of an optimizer's state has a number for each of a tensor."""
    return isinstance(value, torch.Tensor) and value.ndim > 0 and value.numel() == tensor.numel()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what DeepSpeed and its dependencies warn of: their own ways."""
    with quiet("DeepSpeed"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
