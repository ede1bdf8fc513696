"""Pictures sampled while training: as asked for, the same each time, and training unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

from sdxl_lora_plugins.model import Sdxl
from sdxl_lora_plugins.observers.prompts import read_prompts
from sdxl_train import ImageRequest, UserError
from sdxl_train.ldm.samplers import SAMPLERS

if TYPE_CHECKING:
    from pathlib import Path

    from sdxl_train import LoadedModel
    from tests.end_to_end.conftest import SameTensors, TrainLora

# diffusers' schedulers make numpy arrays of tensors in a way that numpy 2 deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*algorithm_types dpmsolver:FutureWarning"),
]

PROMPTS = """# two pictures
a tabby cat --w 64 --h 75 --d 5 --s 2 --l 5 --n ugly, bad --ss k_euler_a

d 20 dice --w 64 --h 64 --s 2 --am 0.5
"""


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(PROMPTS, encoding="utf-8")
    return path


def sampled(folder: Path) -> list[Path]:
    return sorted((folder / "sample").iterdir())


def test_pictures_change_nothing_and_are_named_and_described(
    train_lora: TrainLora, same_tensors: SameTensors, prompts: Path
) -> None:
    bare = train_lora(network_dropout=0.1)
    run = train_lora(
        network_dropout=0.1,
        sample_prompts=str(prompts),
        sample_every_n_steps=2,
        sample_at_first=True,
    )
    assert not run.result.observer_failures
    assert same_tensors(run.tensors, bare.tensors)
    pictures = sampled(run.folder)
    stems = [path.stem.split("_") for path in pictures]
    assert [(stem[1], stem[2], stem[4:]) for stem in stems] == [
        ("000002", "00", ["5"]),
        ("000002", "01", []),
        ("000004", "00", ["5"]),
        ("000004", "01", []),
        ("e000000", "00", ["5"]),
        ("e000000", "01", []),
    ]
    with Image.open(pictures[0]) as image:
        assert image.size == (64, 72)
        text = image.info["parameters"]
    assert text.startswith("a tabby cat\nNegative prompt: ugly, bad\nSteps: 2, Sampler: Euler a")
    assert "CFG scale: 5, Seed: 5, Size: 64x72" in text


def test_cached_inputs_give_the_same_pictures(train_lora: TrainLora, prompts: Path) -> None:
    runs = [
        train_lora(
            network_train_unet_only=True,
            max_train_steps=1,
            sample_prompts=str(prompts),
            cache_latents=cached,
            cache_text_encoder_outputs=cached,
        )
        for cached in (False, True)
    ]
    for first, second in zip(*(sampled(run.folder) for run in runs), strict=True):
        with Image.open(first) as one, Image.open(second) as other:
            # Another layout of the encoder in memory may round the last bit otherwise.
            apart = zip(one.tobytes(), other.tobytes(), strict=True)
            assert max(abs(a - b) for a, b in apart) <= 1


@pytest.fixture(scope="module")
def model(tiny_file: Path) -> LoadedModel:
    return Sdxl(pretrained_model_name_or_path=str(tiny_file)).build("cpu", torch.float32)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_gives_a_picture_again_and_again(model: LoadedModel, name: str) -> None:
    request = ImageRequest(
        prompt="", width=64, height=64, steps=2, guidance_scale=3.0, seed=1, sampler=name
    )
    with torch.no_grad():
        text = model.encode_text(["a cat", ""])
        first, second = model.sampler()(request, text), model.sampler()(request, text)
    assert torch.isfinite(first).all()
    assert first.min() < first.max()
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a cat --d abc", ":2 --d"),
        ("a cat --zz 3", "no option --zz"),
        ("a cat --w 64 --w 72", "given twice"),
        ("a cat --ss eulr", "eulr"),
        ("--w 64", "no prompt"),
    ],
)
def test_mistakes_in_prompts_are_named_by_line(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "p.txt"
    path.write_text(f"a good one\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    assert f"{path}:2" in str(caught.value)
    assert words in str(caught.value)


def test_toml_shares_keys_and_json_takes_lines_and_objects(tmp_path: Path) -> None:
    toml = tmp_path / "p.toml"
    toml.write_text(
        '[prompt]\nwidth = 64\nseed = 1\n[[prompt.subset]]\nprompt = "a"\nseed = 2\n'
        '[[prompt.subset]]\nprompt = "b"\n'
    )
    assert [(p.options.prompt, p.options.seed) for p in read_prompts(toml)] == [("a", 2), ("b", 1)]
    json = tmp_path / "p.json"
    json.write_text('["a --d 3", {"prompt": "b", "sample_steps": 9}]')
    first, second = read_prompts(json)
    assert (first.options.seed, second.options.sample_steps) == (3, 9)


def test_a_broken_vae_is_reported_and_not_fatal(
    train_lora: TrainLora, prompts: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def black(*arguments: Any) -> torch.Tensor:
        return torch.zeros(3, 64, 64)

    monkeypatch.setattr("sdxl_train.ldm.sampling.LdmSampler.__call__", black)
    run = train_lora(sample_prompts=str(prompts), max_train_steps=1)
    assert not run.result.observer_failures
    assert "is of one colour" in caplog.text


def test_a_picture_that_fails_leaves_the_others(
    train_lora: TrainLora, prompts: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    from sdxl_train.ldm.sampling import LdmSampler

    whole = LdmSampler.__call__

    def fails(sampler: LdmSampler, request: ImageRequest, text: Any) -> torch.Tensor:
        if request.prompt == "a tabby cat":
            raise IndexError("index 3 is out of bounds")
        return whole(sampler, request, text)

    monkeypatch.setattr(LdmSampler, "__call__", fails)
    run = train_lora(sample_prompts=str(prompts), max_train_steps=1)
    assert not run.result.observer_failures
    assert "(a tabby cat) failed: IndexError: index 3 is out of bounds" in caplog.text
    assert len(sampled(run.folder)) == 1


@pytest.mark.parametrize(
    "changes",
    [{"mixed_precision": "bf16"}, {"v_parameterization": True}],
    ids=["bf16", "velocity"],
)
def test_pictures_of_all_models_show_something(
    train_lora: TrainLora, prompts: Path, changes: dict[str, Any], deep_v_folder: Path
) -> None:
    if "v_parameterization" in changes:
        changes = changes | {"pretrained_model_name_or_path": str(deep_v_folder)}
    run = train_lora(**changes, sample_prompts=str(prompts), max_train_steps=1)
    pictures = sampled(run.folder)
    assert len(pictures) == 2
    for path in pictures:
        with Image.open(path) as image:
            extremes: Any = image.getextrema()
        # Of each colour: the darkest and the brightest pixel.
        assert all(darkest < brightest for darkest, brightest in extremes), path
