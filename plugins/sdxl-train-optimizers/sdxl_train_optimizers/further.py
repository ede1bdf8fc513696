"""The optimizers of pytorch-optimizer that train a network and can be resumed exactly.

Their options are those of their signatures. The two tables hold every optimizer of the library: a
test builds each one, trains factors of a LoRA with it and goes on from a saved state.
"""

from __future__ import annotations

from typing import Any

from sdxl_train import LibraryOptimizer, quiet


class FromPytorchOptimizer(LibraryOptimizer):
    """What all have in common."""

    @classmethod
    def library_class(cls) -> Any:
        """Import the class, without what a library says that it imports on its way."""
        with quiet("bitsandbytes"):
            return super().library_class()


FURTHER: tuple[str, ...] = (
    "A2Grad",
    "ADOPT",
    "AccSGD",
    "AdEMAMix",
    "AdaBelief",
    "AdaBound",
    "AdaGC",
    "AdaMod",
    "AdaNorm",
    "AdaPNM",
    "AdaSmooth",
    "AdaTAM",
    "Adai",
    "Adalite",
    "AdamC",
    "AdamG",
    "AdamP",
    "AdamS",
    "AdamWSN",
    "Adan",
    "AggMo",
    "Aida",
    "Alice",
    "Amos",
    "Ano",
    "ApolloDQN",
    "AvaGrad",
    "BCOS",
    "DASH",
    "DiffGrad",
    "DualAdam",
    "EXAdam",
    "EmoFact",
    "EmoLynx",
    "EmoNavi",
    "FAdam",
    "FOCUS",
    "FTRL",
    "FlashAdamW",
    "Fromage",
    "Grams",
    "Gravity",
    "GrokFastAdamW",
    "Kate",
    "Kron",
    "LARS",
    "LaProp",
    "Lamb",
    "MADGRAD",
    "MARS",
    "MSVAG",
    "Nero",
    "NovoGrad",
    "PAdam",
    "PID",
    "PNM",
    "QHAdam",
    "QHM",
    "RACS",
    "ROSE",
    "Ranger",
    "Ranger21",
    "SCION",
    "SCIONLight",
    "SGDP",
    "SGDSaI",
    "SGDW",
    "SM3",
    "SOAP",
    "SPAM",
    "SPlus",
    "SRMM",
    "SWATS",
    "ScheduleFreeAdamW",
    "ScheduleFreeRAdam",
    "ScheduleFreeSGD",
    "Shampoo",
    "SignSGD",
    "SimplifiedAdEMAMix",
    "StableAdamW",
    "StableSPAM",
    "TAM",
    "Tiger",
    "VSGD",
    "Yogi",
)
"""Those that their name alone chooses."""

BY_PATH: tuple[str, ...] = (
    "ASGD",
    "AdaDelta",
    "AdaFactor",
    "AdaMax",
    "Adam",
    "AdamW",
    "DAdaptAdaGrad",
    "DAdaptAdam",
    "DAdaptAdan",
    "DAdaptLion",
    "DAdaptSGD",
    "NAdam",
    "Prodigy",
    "RAdam",
    "RMSprop",
    "SGD",
)
"""Those whose name is torch's or another plugin's: ``pytorch_optimizer.NAME`` chooses them."""

LEFT_OUT: dict[str, tuple[str, ...]] = {
    "It is made of a model, or wraps another optimizer.": (
        "AdaLOMO",
        "AdamMini",
        "FriendlySAM",
        "GSAM",
        "LOMO",
        "LookSAM",
        "Lookahead",
        "Magma",
        "OrthoGrad",
        "PCGrad",
        "SAM",
        "SafeFP16Optimizer",
        "ScheduleFreeWrapper",
        "TRAC",
        "WSAM",
    ),
    "It wants to compute the loss several times in a step.": (
        "AliG",
        "BSAM",
        "LBFGS",
    ),
    "It needs the graph of the gradients, for second derivatives.": (
        "AdaHessian",
        "SophiaH",
    ),
    "It needs groups that are marked as Muon's or not.": (
        "AdaGO",
        "AdaMuon",
        "DistributedMuon",
        "Muon",
        "MuonClip",
        "NorMuon",
    ),
    "Its state holds objects that have no place in a file.": (
        "AdaShift",
        "Conda",
        "ScalableShampoo",
    ),
    "It exchanges gradients between processes by itself.": ("DeMo",),
    "It takes matrices only, or pairs of them.": (
        "LoRARite",
        "SpectralSphere",
    ),
    "It leaves whole tensors as they are.": ("SaRA",),
    "It projects groups that carry a rank, which those of a run do not: all are one without it.": (
        "APOLLO",
        "Fira",
        "GaLore",
    ),
}
"""Those that cannot serve, by what becomes of it when one is tried."""
