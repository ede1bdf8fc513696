"""Training weights in 16 bits (``--full_bf16``, ``--full_fp16``) without losing small updates.

A bf16 weight has 8 bits of precision, so an update below a 512th of it would round away, and with
it most of what a low rate teaches. Therefore the optimizer sees each weight and its gradient in
fp32 for the moment of its step, keeps its own state in fp32, and the result is rounded back at
random: up or down with the probability that makes the expected value exact (Zamirai et al. 2020,
"Revisiting BFloat16 Training", section 4). Between steps, weights and gradients have 16 bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Generator, Tensor, nn

_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}
"""Bits of an fp32 mantissa that the type has no room for."""


def round_at_random(values: Tensor, dtype: torch.dtype, generator: Generator) -> Tensor:
    """Round fp32 values to bf16 or fp16, up or down at random, exactly on average.

    The bits of a float of one sign are ordered like the float, so a random number below the last
    kept bit, added before the rest is cut, rounds away from zero with the right probability.
    """
    dropped = _DROPPED_BITS[dtype]
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(
        0, 1 << dropped, bits.shape, dtype=torch.int32, device=bits.device, generator=generator
    )
    cut = (bits + noise) >> dropped << dropped
    return cut.view(torch.float32).to(dtype)


class WideSteps:
    """Keeps parameters in 16 bits, and lets their optimizer compute in fp32.

    Parameters that have a gradient are widened before a step, by :meth:`widen` or at the latest by
    the optimizer's own hook, and rounded after it. So it works for any optimizer.

    Args:
        optimizer: What steps. Its parameters are fp32 and are narrowed here.
        dtype: ``bfloat16`` or ``float16``.
        generator: Gives the generator of a parameter, by its index, in the step that is being done.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype,
        generator: Callable[[int], Generator],
    ) -> None:
        self.dtype = dtype
        self._generator = generator
        self._parameters: list[nn.Parameter] = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        for parameter in self._parameters:
            parameter.data = parameter.data.to(dtype)
        optimizer.register_step_pre_hook(lambda *_: self.widen())
        optimizer.register_step_post_hook(lambda *_: self.narrow())

    def widen(self) -> None:
        """Turn parameters that have a gradient, and the gradients, into fp32."""
        for parameter in self._parameters:
            if parameter.grad is not None and parameter.dtype == self.dtype:
                gradient, parameter.grad = parameter.grad, None  # it must be of one type with it
                parameter.data = parameter.data.float()
                parameter.grad = gradient.float()

    def narrow(self) -> None:
        """Round what :meth:`widen` widened, at random; what has not changed stays as it was."""
        generator: Generator | None = None
        for index, parameter in enumerate(self._parameters):
            if parameter.dtype != self.dtype:
                # Of the first one: fused into the backward pass, each parameter steps alone.
                generator = generator or self._generator(index)
                parameter.grad = None
                parameter.data = round_at_random(parameter.data, self.dtype, generator)
