"""The built-in networks keep the contract of networks."""

from __future__ import annotations

from sdxl_lora_plugins import networks
from sdxl_train.testing import NetworkContract


class TestLora(NetworkContract):
    component = networks.Lora
    loads_in_diffusers = True


class TestLoraWithEverything(NetworkContract):
    component = networks.Lora
    options = {
        "network_dim": 3,
        "conv_dim": 2,
        "conv_alpha": 2.0,
        "rs_lora": True,
        "dora_wd": True,
        "loraplus_lr_ratio": 4.0,
        "down_lr_weight": "1,1,1,0.5",
    }


class TestLocon(NetworkContract):
    component = networks.Locon
    model_options = {"network_train_unet_only": True}
    loads_in_diffusers = True


class TestLokr(NetworkContract):
    component = networks.Lokr
    options = {"factor": 4, "decompose_both": True}
    model_options = {"network_train_unet_only": True}


class TestLokrOfWholeFactors(NetworkContract):
    component = networks.Lokr
    options = {"full_matrix": True}
    model_options = {"network_train_unet_only": True}
    idle = ("network_dim", "network_alpha")
