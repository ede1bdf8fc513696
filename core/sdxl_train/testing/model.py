"""The contract of model families, checked on the tiny model that each offers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

from sdxl_train.components import Model
from sdxl_train.pictures import ImageRequest
from sdxl_train.plugins import PluginHost
from sdxl_train.registry import KIND_BY_NAME, Registry
from sdxl_train.testing.contract import Contract, untouched_process
from sdxl_train.testing.functions import normal
from sdxl_train.testing.predictions import CAPTIONS, Predictions

if TYPE_CHECKING:
    from pathlib import Path

    from sdxl_train.protocols import LoadedModel

_CAPTIONS = ("a photo of a cat", "", "one, two, three, four, five, six, seven")


class ModelContract(Contract[Model]):
    """A base model: frozen, deterministic, with parts to adapt under names that files have."""

    sampler: ClassVar[str] = "ddim"
    """A name of a sampler that the family knows."""

    def make(self, **changes: Any) -> Model:
        """Make the component; where nothing is loaded, any path will do."""
        return super().make(**{"pretrained_model_name_or_path": "model", **changes})

    @pytest.fixture(scope="class")
    @classmethod
    def path(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The family's tiny model on disk."""
        return cls.component.write_tiny(tmp_path_factory.mktemp("contract") / "tiny")

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, path: Path) -> LoadedModel:
        """It, loaded in fp32."""
        return cls().load(path)

    def load(self, path: Path, device: str = "cpu") -> LoadedModel:
        """Load a model of the family in fp32."""
        return self.make(pretrained_model_name_or_path=str(path)).build(device, torch.float32)

    @property
    def pixels(self) -> int:
        """Side of the images that the checks use."""
        return 2 * self.component.bucket_multiple

    def test_base_is_frozen(self, model: LoadedModel) -> None:
        """No weight trains, and nothing is dropped."""
        for part in (*model.parts, *model.frozen_parts):
            trains = [name for name, p in part.module.named_parameters() if p.requires_grad]
            assert not trains, f"{part.title}: {trains[0]} trains"
            assert not part.module.training, f"{part.title} is in training mode"

    def test_parts_name_layers_that_exist(self, model: LoadedModel) -> None:
        """Each layer that can be adapted is there, under one name of its own in files."""
        names: list[str] = []
        for part in (*model.parts, *model.frozen_parts):
            assert part.file_names, f"{part.title} has nothing to adapt"
            for layer, name in part.file_names.items():
                assert hasattr(part.module.get_submodule(layer), "weight"), f"{layer} has no weight"
                assert "." not in name, f"{name} has a dot, which ends the name in files"
                names.append(f"{part.prefix}_{name}")
        assert len(names) == len(set(names)), "two layers have one name"
        keys = [part.name for part in (*model.parts, *model.frozen_parts)]
        assert len(keys) == len(set(keys)), f"two parts have one name: {keys}"

    def test_plan_needs_no_weights(self, path: Path, model: LoadedModel) -> None:
        """On the meta device it has the same parts and shapes, for ``sdxl-train plan``."""
        planned = self.load(path, "meta")
        assert [p.name for p in planned.parts] == [p.name for p in model.parts]
        for plan, real in zip(planned.parts, model.parts, strict=True):
            shapes = {name: p.shape for name, p in plan.module.named_parameters()}
            assert shapes == {name: p.shape for name, p in real.module.named_parameters()}
            assert all(p.is_meta for p in plan.module.parameters())
            assert plan.file_names == real.file_names

    def test_images_become_latents(self, model: LoadedModel) -> None:
        """fp32 [B, C, H/s, W/s], the same each time, whatever the rest of the batch."""
        images = normal(2, 3, self.pixels, 2 * self.pixels).clamp(-1, 1)
        with torch.no_grad():
            latents, again = model.encode_images(images), model.encode_images(images)
            single = model.encode_images(images[1:])
        scale = model.latent_scale
        assert latents.shape[0] == 2
        assert latents.shape[2:] == (self.pixels // scale, 2 * self.pixels // scale)
        assert latents.dtype == torch.float32
        assert torch.equal(latents, again), "the same images give other latents"
        torch.testing.assert_close(single, latents[1:], rtol=1e-4, atol=1e-4)

    def test_captions_are_encoded_one_by_one(self, model: LoadedModel) -> None:
        """The batch is the first dimension, and a caption's encoding is its own."""
        with torch.no_grad():
            together = model.encode_text(_CAPTIONS)
            for index, caption in enumerate(_CAPTIONS):
                alone = model.encode_text([caption])
                assert alone.keys() == together.keys()
                for name, tensor in together.items():
                    assert tensor.shape[0] == len(_CAPTIONS), f"{name} has no batch dimension"
                    torch.testing.assert_close(alone[name][0], tensor[index], rtol=1e-4, atol=1e-4)

    def test_tokens_are_counted(self, model: LoadedModel) -> None:
        """Also those that are cut off; a longer caption has more, an empty one none."""
        long = "a word, " * 1000
        counts = model.count_tokens(["", "a cat", long])
        assert counts[0] == 0
        assert 0 < counts[1] < model.max_tokens < counts[2]
        with torch.no_grad():
            cut, longer = model.encode_text([long]), model.encode_text([long + "more"])
        assert all(torch.equal(cut[name], longer[name]) for name in cut), "more is not cut off"

    def test_prediction_is_that_of_the_latents_shape(self, model: LoadedModel) -> None:
        """Finite, deterministic, told apart by timestep, and gradients reach the latents."""
        questions = Predictions(model, pixels=self.pixels)
        with torch.no_grad():
            first, again = questions.make(), questions.make()
            other = questions.make(timestep=20)
        assert first.shape == questions.latents.shape
        assert torch.isfinite(first).all()
        assert torch.equal(first, again), "the same question gets another answer"
        assert not torch.equal(first, other), "the timestep has no effect"

    def test_prompts_are_encoded_like_captions(self, model: LoadedModel) -> None:
        """Plain prompts of pictures give what captions give."""
        with torch.no_grad():
            captions, prompts = model.encode_text(CAPTIONS), model.encode_prompts(CAPTIONS)
        assert captions.keys() == prompts.keys()
        for name, tensor in captions.items():
            torch.testing.assert_close(prompts[name], tensor, rtol=1e-4, atol=1e-4)

    def test_target_is_that_of_the_schedule(self, model: LoadedModel) -> None:
        """The noise, or the velocity sqrt(abar) noise - sqrt(1 - abar) x_0."""
        latents, noise = normal(2, 4, 3, 3), normal(2, 4, 3, 3, seed=1)
        timesteps = torch.tensor([3, 700])
        abar = model.schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        expected = {
            "epsilon": noise,
            "v_prediction": abar.sqrt() * noise - (1 - abar).sqrt() * latents,
        }[model.schedule.prediction_type]
        torch.testing.assert_close(model.target(latents, noise, timesteps), expected)

    def test_schedule_falls(self, model: LoadedModel) -> None:
        """``abar`` falls strictly from just below 1 to no less than 0."""
        abar = model.schedule.alphas_cumprod
        assert (abar[1:] < abar[:-1]).all()
        assert 0 <= abar[-1].item() < abar[0].item() < 1

    def test_identities_tell_models_apart(
        self, path: Path, model: LoadedModel, tmp_path: Path
    ) -> None:
        """Caches are keyed by them: the same model has the same ones, another one others."""
        again = self.load(path)
        other = self.load(self.component.write_tiny(tmp_path / "other", seed=9))
        for name in ("image_encoder_identity", "text_encoders_identity"):
            mine = getattr(model, name)()
            assert mine == getattr(again, name)(), f"{name} changes from load to load"
            assert mine != getattr(other, name)(), f"{name} is the same for other weights"

    def test_network_is_read_under_its_names(self, model: LoadedModel, tmp_path: Path) -> None:
        """``--network_weights`` reads what the default network of this family writes."""
        from safetensors.torch import save_file

        host = PluginHost()
        host.apply([], [])
        entry = Registry(host).default(KIND_BY_NAME["network"])
        if entry is None:
            pytest.skip("no network is built in")
        network: Any = entry.component()
        with torch.random.fork_rng(devices=[]):
            adapter = network.build(model)
        try:
            state = {name: t.contiguous() for name, t in adapter.state_dict().items()}
            path = tmp_path / "network.safetensors"
            save_file(state, path, metadata=adapter.metadata())
        finally:
            adapter.detach()
        read = model.read_network(path)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[name], state[name]) for name in state)

    def test_picture_is_the_same_each_time(self, model: LoadedModel) -> None:
        """Samples are fp32 [3, H, W] in [0, 1], decided by the request and the weights."""
        request = ImageRequest(
            prompt="a cat",
            width=self.pixels,
            height=self.pixels,
            steps=2,
            guidance_scale=3.0,
            seed=4,
            sampler=self.sampler,
        )
        sampler = model.sampler()
        with torch.no_grad(), untouched_process():
            text = model.encode_text([request.prompt, request.negative_prompt])
            pictures = [sampler(request, text) for _ in range(2)]
        assert pictures[0].shape == (3, self.pixels, self.pixels)
        assert pictures[0].dtype == torch.float32
        assert pictures[0].min() >= 0
        assert pictures[0].max() <= 1
        assert torch.equal(*pictures), "the same request gives another picture"

    def test_metadata_is_text(self, model: LoadedModel) -> None:
        """What it says of itself fits the header of a file, and names no folder."""
        for name, value in model.metadata().items():
            assert isinstance(value, str), f"{name} is a {type(value).__name__}, not text"
            assert not value.startswith("/"), f"{name} tells an absolute path"

    def test_encoders_can_be_freed(self, path: Path) -> None:
        """After caching, encoders that do not train are let go; predictions go on."""
        model = self.load(path)
        questions = Predictions(model, pixels=self.pixels)
        with torch.no_grad():
            before = questions.make()
            text = model.encode_text(CAPTIONS)
            model.release_image_encoder()
            encoders = {id(encoder) for encoder in model.text_encoders}
            if not any(id(part.module) in encoders for part in model.parts):
                model.release_text_encoders()
                assert model.text_encoders == ()
            assert torch.equal(questions.make(text=text), before)

    def test_process_is_left_alone(self, path: Path) -> None:
        """Loading changes nothing that others rely on."""
        with untouched_process():
            self.load(path)
