"""Tokens, chunks and text conditioning."""

from __future__ import annotations

import shutil
import string
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models.embeddings import Timesteps
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdxl_lora_plugins.model import SDXL
from sdxl_train.ldm import text
from sdxl_train.ldm.tokenizer import clip_tokenizer, load_tokenizers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sdxl_train.ldm.loaded import LoadedLdm

CAPTIONS = ["a cat", "1girl, solo, (smile:1.2), it's UPPER <|endoftext|> case", ""]


@pytest.mark.parametrize("of_folder", [False, True])
def test_token_ids_equal_the_golden_ones(
    of_folder: bool, tiny_folder: Path, golden: Callable[[str], Any]
) -> None:
    tokenizers = load_tokenizers(SDXL.text_encoders, tiny_folder if of_folder else None, None)
    for row in golden("tokens"):
        num_chunks = (row["max_token_length"] or 75) // 75
        for tokenizer, padding, expected in zip(
            tokenizers, (None, 0), (row["ids1"], row["ids2"]), strict=True
        ):
            ids = text.tokenize(tokenizer, [row["prompt"]], num_chunks=num_chunks, padding=padding)
            assert ids.tolist() == expected, (row["prompt"], num_chunks)


def test_packaged_tokenizer_is_complete() -> None:
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49408
    assert tokenizer.bos_token_id == 49406
    assert tokenizer.eos_token_id == 49407
    assert clip_tokenizer("!").pad_token_id == 0
    assert tokenizer.decode(tokenizer("ünïcode 猫 ok").input_ids[1:-1]) == "ünïcode 猫 ok"


def test_tokenizer_cache_is_filled_and_read(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = load_tokenizers(SDXL.text_encoders, None, cache)
    assert sorted(path.name for path in cache.iterdir()) == [
        "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k",
        "openai_clip-vit-large-patch14",
    ]
    kept = CLIPTokenizer.from_pretrained(cache / "openai_clip-vit-large-patch14")
    kept.add_tokens(["zzyzx"])
    kept.save_pretrained(cache / "openai_clip-vit-large-patch14")
    second = load_tokenizers(SDXL.text_encoders, None, cache)
    assert len(first[0]) == 49408
    assert len(second[0]) == 49409


@pytest.mark.parametrize(
    ("num_tokens", "lengths"),
    [(10, [10, 0, 0]), (75, [75, 0, 0]), (76, [75, 1, 0]), (300, [75] * 3)],
)
def test_chunks_follow_the_reference_table(num_tokens: int, lengths: list[int]) -> None:
    """The cases of reference appendix A.8, written out by its rules."""
    for padding in (text.EOS, 0):
        chunks = text.chunk_tokens([320] * num_tokens, num_chunks=3, padding=padding)
        assert [chunk.count(320) for chunk in chunks] == lengths
        for chunk, length in zip(chunks, lengths, strict=True):
            rest = [text.EOS] + [padding] * (75 - length)
            if padding == 0 and chunk is chunks[0] and num_tokens == 75:
                rest = [text.EOS]
            assert chunk == [text.BOS] + [320] * length + rest


def test_encoding_equals_the_pipelines_own(
    tiny_folder: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_folder, local_files_only=True)
    with torch.no_grad():
        context, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
        encoded = load_sdxl(tiny_folder).encode_text(CAPTIONS)
    torch.testing.assert_close(encoded["context"], context)
    torch.testing.assert_close(encoded["pooled"], pooled)


def test_long_texts_are_joined_from_chunks(
    tiny_folder: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    """Reference 5.2: first state, the 75 inner states of each chunk, last state of the last."""
    model = load_sdxl(tiny_folder, max_token_length=150)
    caption = ", ".join(f"tag{i}" for i in range(40))
    encoder = CLIPTextModelWithProjection.from_pretrained(tiny_folder / "text_encoder_2")
    ids = text.tokenize(model.tokenizers[1], [caption], num_chunks=2, padding=0)[0]
    with torch.no_grad():
        apart = [encoder(chunk[None], output_hidden_states=True) for chunk in ids]
        encoded = model.encode_text(["a cat", caption])
    states = [output.hidden_states[-2][0] for output in apart]
    expected = torch.cat([states[0][:1], states[0][1:76], states[1][1:76], states[1][76:]])
    assert encoded["context"].shape == (2, 152, 40)
    torch.testing.assert_close(encoded["context"][1, :, 16:], expected)
    torch.testing.assert_close(encoded["pooled"][1], apart[0].text_embeds[0])


def test_pooled_text_is_taken_at_the_first_eos(
    tiny_folder: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    """By the formula: the final norm's output at the first EOS, through the projection."""
    model = load_sdxl(tiny_folder)
    encoder = model.text_encoders[1]
    ids = text.tokenize(model.tokenizers[1], CAPTIONS, num_chunks=1, padding=0)[:, 0]
    first = torch.tensor([row.index(text.EOS) for row in ids.tolist()])
    with torch.no_grad():
        final = encoder(input_ids=ids).last_hidden_state[torch.arange(3), first]
        expected = final @ encoder.state_dict()["text_projection.weight"].T
        pooled = model.encode_text(CAPTIONS)["pooled"]
    torch.testing.assert_close(pooled, expected)


def test_size_embedding_equals_the_golden_one(golden: Callable[[str], Any]) -> None:
    """The projection that diffusers' U-Net applies, to the six sizes in our order."""
    embed = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    for row in golden("size_embeddings")["rows"]:
        numbers = torch.tensor([*row["orig_hw"], *row["crop_tl"], *row["target_hw"]])
        embedded = embed(numbers)
        torch.testing.assert_close(embedded[:, :8], torch.tensor(row["first8_of_each_256"]))
        assert embedded.sum().item() == pytest.approx(row["sum"], abs=1e-2)


def test_sizes_reach_the_unet_in_order(
    tiny_file: Path,
    load_sdxl: Callable[..., LoadedLdm],
    sizes: Callable[[int], dict[str, torch.Tensor]],
) -> None:
    model = load_sdxl(tiny_file, dtype=torch.bfloat16)
    seen: list[torch.Tensor] = []
    project = model.denoiser.get_submodule("add_time_proj")
    project.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    with torch.no_grad():
        condition = {**model.encode_text(["a cat"]), **sizes(1)}
        condition["original_size"] = torch.tensor([[1023, 4095]])
        noisy = torch.zeros(1, 4, 8, 8)
        assert model.predict(noisy, torch.tensor([5]), condition).dtype == torch.float32
    assert seen[0].tolist() == [1023, 4095, 0, 6, 64, 96]


def test_a_folder_with_a_vocabulary_of_its_own_is_read_with_it(
    tiny_folder: Path, tmp_path: Path, load_sdxl: Callable[..., LoadedLdm]
) -> None:
    folder = tmp_path / "small"
    shutil.copytree(tiny_folder, folder)
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {
        token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])
    }
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    for name, kind in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)):
        tokenizer.save_pretrained(folder / f"tokenizer{name}")
        encoder = kind.from_pretrained(folder / f"text_encoder{name}")
        encoder.resize_token_embeddings(len(vocabulary))
        encoder.config.bos_token_id = vocabulary["<|startoftext|>"]
        encoder.config.eos_token_id = vocabulary["<|endoftext|>"]
        encoder.save_pretrained(folder / f"text_encoder{name}")

    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.tokenizer_2.pad_token_id = 0
    with torch.no_grad():
        context, _, pooled, _ = pipeline.encode_prompt("a cat", do_classifier_free_guidance=False)
        encoded = load_sdxl(folder).encode_text(["a cat"])

    torch.testing.assert_close(encoded["context"], context)
    torch.testing.assert_close(encoded["pooled"], pooled)
