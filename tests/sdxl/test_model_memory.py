"""Options that trade memory: what they store, what they keep for later, what they say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sdxl_lora_plugins.fp8 import Fp8Format
from sdxl_lora_plugins.model import Sdxl
from sdxl_lora_plugins.networks import Locon
from sdxl_train import UserError
from sdxl_train.process_options import ProcessOptions
from sdxl_train.quantized import quantize_layers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sdxl_train import RunConfig
    from sdxl_train.ldm.loaded import LoadedLdm


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def a_config(*given: str, device: str = "cpu") -> RunConfig:
    stand_in: Any = SimpleNamespace(
        place=lambda name: f"--{name}",
        is_set=lambda name: name in given,
        device=lambda: torch.device(device),
        processes=ProcessOptions(),
    )
    return cast("RunConfig", stand_in)


def stored_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def predict(
    model: LoadedLdm, sizes: Callable[[int], dict[str, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A prediction, and the gradient of its sum for the noisy latents."""
    noisy = torch.randn(2, 4, 8, 12, generator=generator()).requires_grad_()
    with torch.no_grad():
        condition = {**model.encode_text(["a", "b"]), **sizes(2)}
    prediction = model.predict(noisy, torch.tensor([10, 700]), condition)
    torch.autograd.backward(prediction.sum())
    assert noisy.grad is not None
    return prediction.detach(), noisy.grad


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(64, 48), (3, 5, 64)),
    "no bias": (lambda: nn.Linear(64, 48, bias=False), (3, 5, 64)),
    "convolution": (lambda: nn.Conv2d(32, 48, 3, stride=2, padding=1), (2, 32, 9, 8)),
    "one pixel": (lambda: nn.Conv2d(32, 48, 1), (2, 32, 5, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_of_8_bits_computes_with_the_weight_that_it_shows(
    name: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    root = nn.Sequential(make().to(dtype)).requires_grad_(False)
    exact = cast("nn.Linear", root[0]).weight.detach().float()
    quantize_layers(root, ("0",), Fp8Format())
    layer: Any = root[0]
    shown = layer.weight.float()
    # Three bits of mantissa round by a 16th at most; on average by some 2.6 %.
    assert float((shown - exact).norm() / exact.norm()) < 0.035
    assert float(((shown - exact).abs() / exact.abs().amax()).max()) <= 1 / 16 / 2 + 0.01

    x = torch.randn(shape, generator=generator()).to(dtype).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    output = layer(x)
    how = {"stride": layer.stride, "padding": layer.padding} if len(shape) == 4 else {}
    function = F.conv2d if len(shape) == 4 else F.linear
    expected = function(twin, layer.weight, layer.bias, **how)
    assert torch.equal(output, expected)
    gradient = torch.randn(output.shape, generator=generator(1)).to(dtype)
    output.backward(gradient)
    torch.autograd.backward(expected, gradient)
    assert x.grad is not None
    assert twin.grad is not None
    torch.testing.assert_close(
        x.grad, twin.grad, rtol=2e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-2
    )


def test_a_layer_of_8_bits_keeps_8_bits_for_the_backward_pass() -> None:
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    root = nn.Sequential(nn.Linear(256, 512, bias=False)).requires_grad_(False)
    quantize_layers(root, ("0",), Fp8Format())
    x = torch.randn(1, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        root(x)
    # A byte for each weight and four for each output's scale; of fp32 it would be four times that.
    assert sum(kept.values()) == 256 * 512 + 4 * 512


def test_assigning_a_weight_stores_it_anew() -> None:
    root = nn.Sequential(nn.Linear(8, 4)).requires_grad_(False)
    quantize_layers(root, ("0",), Fp8Format())
    layer: Any = root[0]
    weight = torch.randn(4, 8, generator=generator())
    layer.weight = weight
    torch.testing.assert_close(layer.weight, weight, rtol=1 / 16, atol=1e-2)
    assert layer.packed[0].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("source", ["tiny_file", "tiny_folder"])
def test_fp8_base_stores_a_quarter_and_predicts_nearly_the_same(
    source: str,
    request: pytest.FixtureRequest,
    load_sdxl: Callable[..., LoadedLdm],
    sizes: Callable[[int], dict[str, torch.Tensor]],
) -> None:
    path = request.getfixturevalue(source)
    plain, unet_only, both = (load_sdxl(path) for _ in range(3))
    planned = load_sdxl(path, "meta")
    unet_only.quantize(Fp8Format(), denoiser_only=True)
    for model in (both, planned):
        model.quantize(Fp8Format(), denoiser_only=False)
    for encoder, plain_encoder in zip(unet_only.text_encoders, plain.text_encoders, strict=True):
        assert stored_bytes(encoder) == stored_bytes(plain_encoder)
    # Norms, embeddings, biases and scales stay fp32; they are few in a full-size model.
    weights = [m for m in plain.denoiser.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    wide = stored_bytes(plain.denoiser)
    saved = wide - stored_bytes(unet_only.denoiser)
    assert saved > 0.6 * sum(m.weight.numel() for m in weights) * 3
    assert stored_bytes(both.denoiser) == stored_bytes(unet_only.denoiser)
    assert stored_bytes(planned.denoiser) == stored_bytes(both.denoiser)
    for encoder, plain_encoder in zip(both.text_encoders, plain.text_encoders, strict=True):
        assert stored_bytes(encoder) < stored_bytes(plain_encoder)
    assert [part.file_names for part in both.parts] == [part.file_names for part in plain.parts]

    expected, gradient = predict(plain, sizes)
    found, found_gradient = predict(both, sizes)
    assert float((found - expected).norm() / expected.norm()) < 0.1
    assert float((found_gradient - gradient).norm() / gradient.norm()) < 0.25


# The tracer looks at attributes of every tensor that it meets.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "options",
    [
        {"mem_eff_attn": True},
        {"sdpa": False},
        {"gradient_checkpointing": True, "cpu_offload_checkpointing": True},
        {
            "gradient_checkpointing": True,
            "checkpoint_levels": [0, 2],
            "cpu_offload_checkpointing": True,
        },
        {"channels_last": True},
        {"channels_last": True, "disable_mmap_load_safetensors": True},
        {"disable_mmap_load_safetensors": True},
        {"torch_compile": True, "dynamo_backend": "eager"},
        {"lowram": True},
        {"highvram": True},
    ],
)
def test_memory_options_change_no_result(
    options: dict[str, Any],
    tiny_file: Path,
    load_sdxl: Callable[..., LoadedLdm],
    sizes: Callable[[int], dict[str, torch.Tensor]],
) -> None:
    expected, gradient = predict(load_sdxl(tiny_file), sizes)
    found, found_gradient = predict(load_sdxl(tiny_file, **options), sizes)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-3, atol=1e-5)


def test_mem_eff_attn_never_makes_the_whole_matrix(
    tiny_file: Path,
    load_sdxl: Callable[..., LoadedLdm],
    sizes: Callable[[int], dict[str, torch.Tensor]],
) -> None:
    """Of 8 x 12 latents the first level with attention has 24 tokens."""

    def matrices(**options: Any) -> int:
        found = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.ndim >= 3 and tensor.shape[-2:] == (24, 24):
                found.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            predict(load_sdxl(tiny_file, **options), sizes)
        return len(found)

    assert matrices(sdpa=False) > 0
    assert matrices(mem_eff_attn=True) == 0


def test_channels_stay_side_by_side_from_convolution_to_convolution(
    tiny_file: Path,
    load_sdxl: Callable[..., LoadedLdm],
    sizes: Callable[[int], dict[str, torch.Tensor]],
) -> None:
    def images(*, channels_last: bool) -> dict[str, bool]:
        """For what each convolution reads, and for each weight of one: is it laid out so?"""
        found: dict[str, bool] = {}
        model = load_sdxl(tiny_file, channels_last=channels_last)
        for name, layer in model.denoiser.named_modules():
            if isinstance(layer, nn.Conv2d):
                if layer.kernel_size != (1, 1):  # whose two layouts are the same
                    found[f"{name}.weight"] = _is_last(layer.weight)

                def look(_: nn.Module, inputs: Any, name: str = name) -> None:
                    found[name] = _is_last(inputs[0])

                layer.register_forward_pre_hook(look)
        predict(model, sizes)
        return found

    assert all(images(channels_last=True).values())
    assert not any(images(channels_last=False).values())


def _is_last(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


def test_factors_of_convolutions_are_laid_out_like_their_layers(
    tiny_file: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    adapter = Locon(network_dim=4, conv_dim=4).build(load_sdxl(tiny_file, channels_last=True))
    wide = [p for m in adapter.modules() for p in m.parameters() if p.shape[2:] == (3, 3)]
    assert wide
    assert all(_is_last(parameter) for parameter in wide)


def test_only_the_levels_that_are_named_recompute(
    tiny_file: Path,
    load_sdxl: Callable[..., LoadedLdm],
    sizes: Callable[[int], dict[str, torch.Tensor]],
) -> None:
    """Resnets and transformers of a level are counted in the forward pass and the one after it."""

    def computed(levels: list[int] | None) -> dict[str, int]:
        model = load_sdxl(tiny_file, gradient_checkpointing=True, checkpoint_levels=levels)
        counts: dict[str, int] = {}
        blocks: dict[str, Any] = dict(model.denoiser.named_modules())
        for name in ("down_blocks.0", "up_blocks.2", "down_blocks.1", "up_blocks.1"):
            resnet = blocks[f"{name}.resnets.0"]

            def count(*_: Any, name: str = name) -> None:
                counts[name] = counts.get(name, 0) + 1

            resnet.norm1.register_forward_hook(count)
        middle = blocks["mid_block.attentions.0.transformer_blocks.0.norm1"]
        middle.register_forward_hook(lambda *_: counts.update(mid=counts.get("mid", 0) + 1))
        predict(model, sizes)
        return counts

    names = ("down_blocks.0", "up_blocks.2", "down_blocks.1", "up_blocks.1", "mid")
    assert computed(None) == dict.fromkeys(names, 2)
    assert computed([0]) == {**dict.fromkeys(names, 1), "down_blocks.0": 2, "up_blocks.2": 2}
    assert computed([2]) == {**dict.fromkeys(names, 1), "mid": 2}


def test_blocks_are_compiled_for_more_shapes_than_torch_would(
    tiny_file: Path, load_sdxl: Callable[..., LoadedLdm], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "diffusers.UNet2DConditionModel.compile_repeated_blocks",
        lambda unet, **options: compiled.append(options),
    )
    with torch._dynamo.config.patch(recompile_limit=8):
        load_sdxl(tiny_file, "meta", torch_compile=True, dynamo_use_dynamic=True)
        assert torch._dynamo.config.recompile_limit == 8
        load_sdxl(tiny_file, "meta", torch_compile=True, dynamo_mode="max-autotune-no-cudagraphs")
        assert torch._dynamo.config.recompile_limit == 256
    assert compiled == [
        {"backend": "inductor", "mode": None, "dynamic": True},
        {"backend": "inductor", "mode": "max-autotune-no-cudagraphs", "dynamic": False},
    ]


def test_offloading_takes_what_is_kept_to_the_cpu(
    tiny_file: Path,
    load_sdxl: Callable[..., LoadedLdm],
    sizes: Callable[[int], dict[str, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pinned: list[bool] = []
    save_on_cpu = torch.autograd.graph.save_on_cpu

    def seen(pin_memory: bool) -> Any:
        pinned.append(pin_memory)
        return save_on_cpu(pin_memory)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", seen)
    predict(load_sdxl(tiny_file), sizes)
    assert pinned == []
    options = {"gradient_checkpointing": True, "cpu_offload_checkpointing": True}
    predict(load_sdxl(tiny_file, **options), sizes)
    assert pinned == [False]


def test_unmapped_files_are_read_by_the_bytes_that_are_needed(
    tiny_file: Path,
    tiny_folder: Path,
    load_sdxl: Callable[..., LoadedLdm],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("the file was mapped")

    monkeypatch.setattr("sdxl_train.ldm.weight_files.safe_open", fail)
    for source in (tiny_file, tiny_folder):
        model = load_sdxl(source, disable_mmap_load_safetensors=True)
        for part in model.parts:
            for parameter in part.module.parameters():
                assert parameter.untyped_storage().nbytes() == parameter.nbytes
        with pytest.raises(AssertionError, match="mapped"):
            _ = load_sdxl(source).parts


def test_highvram_keeps_freed_device_memory(
    tiny_file: Path, load_sdxl: Callable[..., LoadedLdm], monkeypatch: pytest.MonkeyPatch
) -> None:
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    model = load_sdxl(tiny_file, highvram=True)
    assert model.vae is not None
    model.release_image_encoder()
    assert emptied == []
    model = load_sdxl(tiny_file)
    assert model.vae is not None
    model.release_image_encoder()
    assert emptied == [True]


def test_compiler_that_torch_lacks_is_refused(
    tiny_file: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    with pytest.raises(UserError, match=r"--dynamo_backend: 'nvfuser' is no .*\n.*inductor"):
        load_sdxl(tiny_file, "meta", torch_compile=True, dynamo_backend="nvfuser")


def test_xformers_is_asked_for_where_it_is_missing(
    tiny_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Sdxl(pretrained_model_name_or_path=str(tiny_file), xformers=True)
    monkeypatch.setattr("sdxl_train.ldm.memory.find_spec", lambda name: None)
    (problem,) = model.memory_problems(a_config())
    assert "pip install xformers" in problem.remedy


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"xformers": True}, "--xformers: needs a GPU"),
        ({"torch_compile": True, "dynamo_mode": "max-autotune"}, "--dynamo_mode: replays CUDA"),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(options: dict[str, Any], named: str) -> None:
    model = Sdxl(pretrained_model_name_or_path="", **options)
    config = a_config()
    (problem,) = model.machine_problems(config)
    assert named in str(problem)
    assert list(model.machine_problems(a_config(device="cuda"))) == []
    assert list(Sdxl(pretrained_model_name_or_path="").machine_problems(config)) == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cpu_offload_checkpointing": True}, ("cpu_offload_checkpointing", "gradient_checkp")),
        ({"dynamo_backend": "eager"}, ("--dynamo_backend", "--torch_compile")),
        ({"dynamo_mode": "max-autotune"}, ("--dynamo_mode", "--torch_compile")),
        ({"dynamo_use_dynamic": True}, ("--dynamo_use_dynamic", "--torch_compile")),
        ({"checkpoint_levels": [0]}, ("--checkpoint_levels", "--gradient_checkpointing")),
        (
            {"torch_compile": True, "dynamo_backend": "eager", "dynamo_mode": "max-autotune"},
            ("--dynamo_mode", "inductor", "eager"),
        ),
    ],
)
def test_memory_options_alone_that_need_another_are_refused(
    options: dict[str, Any], named: tuple[str, ...], tiny_file: Path
) -> None:
    model = Sdxl(pretrained_model_name_or_path=str(tiny_file), **options)
    (problem,) = model.memory_problems(a_config())
    assert all(name in str(problem) for name in named)


@pytest.mark.parametrize(
    ("options", "remark"),
    [
        ({"mem_eff_attn": True, "sdpa": True}, "--sdpa has no effect: --mem_eff_attn wins"),
        ({"lowram": True}, "--lowram has no effect"),
    ],
)
def test_memory_options_without_effect_are_remarked_on(
    options: dict[str, Any], remark: str, tiny_file: Path
) -> None:
    model = Sdxl(pretrained_model_name_or_path=str(tiny_file), **options)
    (found,) = model.memory_remarks(a_config(*options))
    assert found.startswith(remark)
