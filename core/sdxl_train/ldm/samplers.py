"""The samplers by the names of sd-scripts: which scheduler of diffusers, and how. Light to import.

``k_`` means the noise levels of Karras et al. 2022 (equation 5), ``_a`` an ancestral sampler.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

SamplerName = Literal[
    "ddim",
    "pndm",
    "lms",
    "euler",
    "euler_a",
    "heun",
    "dpm_2",
    "dpm_2_a",
    "dpmsolver",
    "dpmsolver++",
    "dpmsingle",
    "k_lms",
    "k_euler",
    "k_euler_a",
    "k_dpm_2",
    "k_dpm_2_a",
    "dpm++_2m_karras",
]


@dataclass(frozen=True)
class Sampler:
    """A scheduler of diffusers.

    Attributes:
        scheduler: Name of the class, in diffusers or in :mod:`.sampling`.
        title: What A1111's picture parameters call it.
        options: How it differs from the class's defaults.
        takes_spacing: Whether timesteps can be spaced otherwise than evenly from the last one.
    """

    scheduler: str
    title: str
    options: Mapping[str, Any] = field(default_factory=dict)
    takes_spacing: bool = True


_KARRAS: Final = {"use_karras_sigmas": True}
_DPM_PLUS: Final = {"algorithm_type": "dpmsolver++"}

SAMPLERS: Final[dict[SamplerName, Sampler]] = {
    # Clipping is for models of pixels; latents exceed 1.
    "ddim": Sampler("DDIMScheduler", "DDIM", {"clip_sample": False, "set_alpha_to_one": False}),
    "pndm": Sampler("PNDMScheduler", "PLMS", {"skip_prk_steps": True}),
    "lms": Sampler("LMSDiscreteScheduler", "LMS"),
    "euler": Sampler("EulerDiscreteScheduler", "Euler"),
    "euler_a": Sampler("EulerAncestralDiscreteScheduler", "Euler a"),
    "heun": Sampler("HeunDiscreteScheduler", "Heun"),
    "dpm_2": Sampler("KDPM2DiscreteScheduler", "DPM2"),
    "dpm_2_a": Sampler("KDPM2AncestralDiscreteScheduler", "DPM2 a"),
    # The last level must not be zero for the first of the algorithms: its logarithm is taken.
    "dpmsolver": Sampler(
        "DPMSolverMultistepScheduler",
        "DPM 2M",
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    "dpmsolver++": Sampler("DPMSolverMultistepScheduler", "DPM++ 2M", _DPM_PLUS),
    "dpmsingle": Sampler("DPMSolverSinglestepScheduler", "DPM++ 2S", _DPM_PLUS, False),
    "k_lms": Sampler("LMSDiscreteScheduler", "LMS Karras", _KARRAS),
    "k_euler": Sampler("EulerDiscreteScheduler", "Euler Karras", _KARRAS),
    "k_euler_a": Sampler("KarrasEulerAncestralScheduler", "Euler a Karras"),
    "k_dpm_2": Sampler("KDPM2DiscreteScheduler", "DPM2 Karras", _KARRAS),
    "k_dpm_2_a": Sampler("KDPM2AncestralDiscreteScheduler", "DPM2 a Karras", _KARRAS),
    "dpm++_2m_karras": Sampler(
        "DPMSolverMultistepScheduler", "DPM++ 2M Karras", {**_DPM_PLUS, **_KARRAS}
    ),
}
