"""Frozen weights of which each process holds a part (Zhao et al. 2023), by torch's FSDP.

A block's weights are gathered when it is computed, forward and backward, and freed afterwards.
What trains stays whole in each process: it is not among the modules of the model.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator

    from sdxl_train.loop import StepBatches
    from sdxl_train.ranks import Ranks

_SHARE = 20
"""A block that is gathered at once has at most this fraction of all weights. In a large U-Net those
are the transformer blocks and the residual blocks."""


class SpreadModule:
    """A module whose frozen weights are spread over the processes.

    Args:
        module: The denoiser. Every process has it whole before.
        ranks: The processes.
        device: Where it computes.
        offload: Keep this process's part in main memory.
    """

    def __init__(
        self, module: nn.Module, ranks: Ranks, device: torch.device, *, offload: bool
    ) -> None:
        self.module = module
        self.ranks = ranks
        mesh = DeviceMesh.from_group(dist.new_group(), device.type)
        policy = CPUOffloadPolicy(pin_memory=device.type != "cpu") if offload else OffloadPolicy()
        total = sum(parameter.numel() for parameter in module.parameters())
        blocks = [*_blocks(module, total // _SHARE)]
        # The outermost one begins and ends each pass, whether or not it has weights beside.
        for block in blocks if blocks[-1] is module else [*blocks, module]:
            fully_shard(block, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
        # Or how far a backward pass goes, and what it gathers, could differ between processes:
        # module dropout leaves parts of a network out.
        module.register_forward_pre_hook(_with_input_gradient, with_kwargs=True)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Have all weights in each process, so that each may compute what the others do not."""
        self.ranks.gather(None)  # or who fails before would leave the others waiting
        blocks = [block for block in self.module.modules() if isinstance(block, FSDPModule)]
        for block in blocks:
            block.set_reshard_after_forward(False, recurse=False)
            block.unshard()
        try:
            yield
        finally:
            for block in blocks:
                block.set_reshard_after_forward(True, recurse=False)
                block.reshard()

    def enter(self, steps: Iterable[StepBatches]) -> Iterator[StepBatches]:
        """Give the batches of steps when every process has its own.

        From there to the next meeting the processes wait for each other's weights.
        """
        for step in steps:
            self.ranks.gather(None)
            self.ranks.entangled = True
            yield step


def _blocks(module: nn.Module, limit: int) -> Generator[nn.Module, None, bool]:
    """Give the largest blocks with at most ``limit`` weights, then those that hold others beside.

    Single layers belong to what holds them: they are too small to travel alone. Says in the end
    whether some are left that a container holds, which is not called.
    """
    left = any(True for _ in module.parameters(recurse=False))
    for child in module.children():
        size = sum(parameter.numel() for parameter in child.parameters())
        if next(child.children(), None) is None:
            left |= size > 0
        elif _is_called(child) and 0 < size <= limit:
            yield child
        else:
            left |= yield from _blocks(child, limit)
    if left and _is_called(module):
        yield module
        return False
    return left


def _is_called(module: nn.Module) -> bool:
    return not isinstance(module, (nn.ModuleList, nn.ModuleDict))


def _with_input_gradient(
    module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if torch.is_grad_enabled():
        sample, *rest = inputs
        inputs = (sample.detach().requires_grad_(), *rest)
    return inputs, named
