"""Every family of base models with every network: what is generic works with all of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from lycoris.kohya import create_network_from_weights
from safetensors.torch import load_file, save_file

import sdxl_train
from sdxl_lora_plugins.model import Sdxl
from sdxl_lora_plugins.networks import Locon
from sdxl_train.ldm import LoadedLdm, write_tiny
from sdxl_train_sd import Sd1, Sd2

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from tests.end_to_end.conftest import CheckRun, MakeOptions, SameTensors, TrainLora

FAMILIES: dict[str, type[Sdxl | Sd1 | Sd2]] = {"sdxl": Sdxl, "sd1": Sd1, "sd2": Sd2}
NETWORKS: dict[str, dict[str, Any]] = {
    "lora": {},
    "locon": {"network_args": ["loraplus_lr_ratio=4"]},
    "lokr": {"network_args": ["factor=4"]},
    "lycoris.kohya": {"network_args": ["algo=loha", "train_norm=true"]},
    "lycoris:full": {"network_args": ["preset=attn-only"], "network_dim": None},
    "tlora": {},
}
PREFIXES = {
    "sdxl": {"lora_unet_input_blocks", "lora_te1_text_model", "lora_te2_text_model"},
    "sd1": {"lora_unet_down_blocks", "lora_te_text_model"},
    "sd2": {"lora_unet_down_blocks", "lora_te_text_model"},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write the tiny model of a family once: a folder, or a file with this ending."""
    folder = tmp_path_factory.mktemp("families")

    def write(name: str, ending: str = "", **options: Any) -> Path:
        path = folder / f"{name}{''.join(options.values())}{ending}"
        if not path.exists():
            family = FAMILIES[name]
            write_tiny(path, family.family, family.tiny, single_file=bool(ending), **options)
        return path

    return write


@pytest.fixture(scope="module")
def train(train_lora: TrainLora, tiny: Callable[..., Path]) -> Callable[..., Any]:
    """Train a network on the tiny model of a family."""

    def run(name: str, **changes: Any) -> Any:
        return train_lora(
            **{
                "model_type": name,
                "pretrained_model_name_or_path": str(tiny(name)),
                "train_batch_size": 1,
                "max_train_steps": 1,
                "learning_rate": 0.1,
                "network_alpha": None,
                **changes,
            }
        )

    return run


def load(name: str, path: Path, **options: Any) -> LoadedLdm:
    family = FAMILIES[name]
    return family(pretrained_model_name_or_path=str(path), **options).build("cpu", torch.float32)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_network_trains_on_every_family(
    name: str, network: str, train: Callable[..., Any]
) -> None:
    trained = train(name, network_module=network, **NETWORKS[network])

    changed = {
        key for key, t in trained.tensors.items() if not torch.equal(t, trained.initial[key])
    }
    assert {p for p in PREFIXES[name] if any(k.startswith(p) for k in changed)} == PREFIXES[name]
    assert all(torch.isfinite(tensor).all() for tensor in trained.tensors.values())
    version = {"sdxl": "sdxl_base_v1-0", "sd1": "sd_v1", "sd2": "sd_v2"}[name]
    assert trained.metadata["ss_base_model_version"] == version
    assert trained.metadata["ss_v2"] == str(name == "sd2")


def outputs(model: LoadedLdm) -> list[Tensor]:
    """Give what the model makes of a caption, and of noise beside it."""
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        condition = model.encode_text(["a cat on a mat"])
        return [condition["context"], model.predict(noisy, torch.tensor([300]), condition)]


@pytest.fixture(scope="module")
def locon(train: Callable[..., Any]) -> Callable[[str], tuple[Path, list[Tensor], list[Tensor]]]:
    """Train a LoCon on a family; give its file, and what the model makes without and with it."""

    def made(name: str) -> tuple[Path, list[Tensor], list[Tensor]]:
        trained = train(name, network_module="locon", max_train_steps=2, network_dim=4)
        model = load(name, Path(trained.options["pretrained_model_name_or_path"]))
        bare = outputs(model)
        adapter = Locon(network_dim=4).build(model)
        adapter.load_state_dict(trained.tensors)
        return trained.path, bare, outputs(model)

    return made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_clients_compute_what_training_did(
    name: str, locon: Callable[[str], Any], tiny: Callable[..., Path]
) -> None:
    path, bare, ours = locon(name)

    pipeline = StableDiffusionPipeline.from_pretrained(tiny(name), safety_checker=None)
    pipeline.load_lora_weights(str(path))
    require_same(bare, ours, in_parts(name, tiny(name), pipeline.unet, pipeline.text_encoder))

    model = load(name, tiny(name))
    text, unet = torch.nn.Module(), torch.nn.Module()
    text.add_module("text_model", model.text_encoders[0])
    (part,) = [part for part in model.parts if part.name == "unet"]
    for layer, own in part.file_names.items():
        unet.add_module(own, part.module.get_submodule(layer))
    network, tensors = create_network_from_weights(1.0, str(path), None, text, unet)
    network.apply_to(text, unet, True, True)
    taken = network.load_state_dict(tensors, strict=False)
    assert not [key for key in taken.missing_keys if not key.endswith(".scalar")]
    assert taken.unexpected_keys == []
    network.eval()
    require_same(bare, ours, outputs(model))


def in_parts(name: str, path: Path, unet: nn.Module, encoder: nn.Module) -> list[Tensor]:
    """Give what parts that a client changed make of the same."""
    model = load(name, path)
    model._unet, model._text_encoders = unet, (encoder,)
    return outputs(model)


def require_same(bare: list[Tensor], ours: list[Tensor], theirs: list[Tensor]) -> None:
    for before, expected, found in zip(bare, ours, theirs, strict=True):
        effect = (expected - before).norm()
        assert effect > 1e-2
        assert (found - expected).norm() < 1e-3 * effect


def test_values_for_the_25_blocks_count_for_convolutions_too(tiny: Callable[..., Path]) -> None:
    dims = ",".join(str(index + 1) for index in range(25))
    network = Locon.model_validate({"block_dims": dims, "conv_block_dims": dims})
    adapter: Any = network.build(load("sd1", tiny("sd1")))
    ranks = {
        key.removeprefix("lora_unet_").partition(".")[0]: len(tensor)
        for key, tensor in adapter.state_dict().items()
        if key.endswith("lora_down.weight") and "unet" in key
    }

    assert ranks["down_blocks_0_attentions_0_proj_in"] == 2
    assert ranks["down_blocks_0_downsamplers_0_conv"] == 4
    assert ranks["down_blocks_3_resnets_1_conv1"] == 12
    assert ranks["mid_block_attentions_0_proj_in"] == ranks["mid_block_resnets_1_conv2"] == 13
    assert ranks["up_blocks_0_upsamplers_0_conv"] == 16
    assert ranks["up_blocks_3_resnets_2_conv_shortcut"] == 25


def test_run_of_velocity_resumes_exactly_from_caches_with_pictures(
    train: Callable[..., Any], tiny: Callable[..., Path], tmp_path: Path, same_tensors: SameTensors
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8")
    common = {
        "pretrained_model_name_or_path": str(tiny("sd2", prediction_type="v_prediction")),
        "cache_latents": True,
        "cache_text_encoder_outputs": True,
        "network_train_unet_only": True,
        "min_snr_gamma": 5,
        "noise_offset": 0.1,
    }
    whole = train("sd2", max_train_steps=2, sample_prompts=str(prompts), **common)
    first = train("sd2", max_train_steps=1, save_state=True, **common)
    state = next(first.folder.glob("*-state"))
    second = train("sd2", max_train_steps=2, resume=str(state), **common)

    assert same_tensors(whole.tensors, second.tensors)
    assert whole.metadata["modelspec.prediction_type"] == "v"
    assert whole.metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert len(list((whole.folder / "sample").glob("*.png"))) == 1


def test_sd_scripts_switch_chooses_the_family_and_its_resolution(
    options: MakeOptions, tiny: Callable[..., Path]
) -> None:
    chosen = options(
        pretrained_model_name_or_path=str(tiny("sd2")),
        v2=True,
        v_parameterization=True,
        resolution=None,
        bucket_no_upscale=False,
        enable_bucket=False,
        text_encoder_lr=1e-5,
        clip_skip=1,
        max_token_length=150,
    )
    plan = sdxl_train.plan(chosen).as_json()

    assert plan["options"]["model_type"]["value"] == "sd2"
    assert [bucket["resolution"] for bucket in plan["dataset"]["buckets"]] == [[512, 512]]
    assert set(plan["modules"]) == {"unet", "te"}


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("sd1", ("sd2", ".safetensors"), "is a Stable Diffusion 2.x checkpoint"),
        ("sd1", ("sd2", ""), "holds a Stable Diffusion 2.x model"),
        ("sd1", ("sdxl", ".safetensors"), "is an SDXL checkpoint"),
        ("sd2", ("sd1", ".ckpt"), "is a Stable Diffusion 1.x checkpoint"),
        ("sd2", ("sdxl", ""), "holds an SDXL model"),
        ("sdxl", ("sd1", ".safetensors"), "checkpoint, or add --model_type sd1"),
        ("sdxl", ("sd2", ""), "holds a Stable Diffusion 2.x model"),
    ],
)
def test_checkpoint_of_another_family_is_refused_in_one_line(
    name: str,
    source: tuple[str, str],
    message: str,
    check_run: CheckRun,
    tiny: Callable[..., Path],
) -> None:
    problems, _ = check_run(model_type=name, pretrained_model_name_or_path=str(tiny(*source)))

    (problem,) = problems
    assert message in problem


def network_for(name: str, path: Path) -> Path:
    """Write one layer of a network for the real model of a family."""
    layer, width = {
        "sdxl": ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 2048),
        "sd1": ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", 768),
        "sd2": ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", 1024),
    }[name]
    tensors = {
        f"{layer}.lora_down.weight": torch.ones(2, width),
        f"{layer}.lora_up.weight": torch.ones(640, 2),
        f"{layer}.alpha": torch.tensor(1.0),
    }
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("name", "other"),
    [("sd1", "sdxl"), ("sd1", "sd2"), ("sd2", "sd1"), ("sd2", "sdxl"), ("sdxl", "sd1")],
)
def test_network_of_another_family_is_refused_in_one_line(
    name: str, other: str, check_run: CheckRun, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    titles = {"sdxl": "SDXL", "sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x"}
    problems, _ = check_run(
        model_type=name,
        pretrained_model_name_or_path=str(tiny(name)),
        network_weights=str(network_for(other, tmp_path / "network.safetensors")),
    )

    (problem,) = problems
    assert f"is a network for {titles[other]}, not for {titles[name]}" in problem


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("sd1", {"text_encoder_lr": [1e-5, 2e-5]}, "text_encoder_lr"),
        ("sd1", {"text_encoder_lr1": 1e-5}, "is an option of model sdxl, which this run does not"),
        ("sd1", {"v2": True}, "is an option of model sd2, which this run does not use"),
        ("sd2", {"v2": False}, "contradicts model_type = sd2"),
        ("sdxl", {"v2": True}, "is an option of model sd2"),
        ("sd1", {"network_args": ["block_dims=1,2"]}, "2 values, expected 25, one for each of inp"),
        ("sd1", {"network_args": ["block_dims=time_embed=4"]}, "there is no 'time_embed'"),
        ("sdxl", {"network_args": [f"down_lr_weight={'1,' * 9}1"]}, "10 values for 9 blocks"),
    ],
)
def test_options_of_another_family_are_refused_in_one_line(
    name: str,
    wrong: dict[str, Any],
    message: str,
    check_run: CheckRun,
    tiny: Callable[..., Path],
) -> None:
    problems, _ = check_run(model_type=name, pretrained_model_name_or_path=str(tiny(name)), **wrong)

    (problem,) = problems
    assert message in problem


def test_family_of_the_documents_trains(
    train_lora: TrainLora, tmp_path: Path, recorder: Path
) -> None:
    page = Path(__file__).parents[2] / "docs" / "model-families.md"
    code = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[0]
    plugin = tmp_path / "bk_sdm.py"
    plugin.write_text(code, encoding="utf-8")
    names: dict[str, Any] = {}
    exec(compile(code, str(plugin), "exec"), names)
    family = names["BkSdm"]
    model = write_tiny(tmp_path / "bk.safetensors", family.family, family.tiny, single_file=True)
    trained = train_lora(
        plugin=[str(recorder), str(plugin)],
        model_type="bk-sdm",
        pretrained_model_name_or_path=str(model),
        resolution=64,
        max_train_steps=1,
    )

    assert trained.metadata["ss_base_model_version"] == "bk_sdm_base"
    assert any("lora_te_text_model_encoder_layers_1" in key for key in load_file(trained.path))
