"""Weights in captions, the layer that is taken, and how captions are counted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from sdxl_lora_plugins.model import Sdxl
from sdxl_train import UserError
from sdxl_train.ldm import text
from sdxl_train.ldm.prompt_weights import weighted_pieces
from sdxl_train.ldm.tokenizer import clip_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sdxl_train.ldm.loaded import LoadedLdm

LONG = "a very long text, " * 40


def load(folder: Path, **options: Any) -> LoadedLdm:
    return Sdxl(pretrained_model_name_or_path=str(folder), **options).build("cpu", torch.float32)


@torch.no_grad()
def encoded(model: LoadedLdm, *captions: str) -> dict[str, torch.Tensor]:
    return model.encode_text(captions)


def test_weights_equal_the_golden_ones(golden: Callable[[str], Any]) -> None:
    for row in golden("captions")["prompt_weights"]:
        pieces = weighted_pieces(row["text"])
        assert [piece for piece, _ in pieces] == [piece for piece, _ in row["out"]], row["text"]
        assert [w for _, w in pieces] == pytest.approx([w for _, w in row["out"]]), row["text"]


@pytest.mark.parametrize(
    ("given", "pieces"),
    [
        ("", []),
        ("a)b]", [("a)b]", 1.0)]),
        ("x:1.5)", [("x:1.5)", 1.0)]),
        ("[a (b", [("a ", 1 / 1.1), ("b", 1.0)]),
        ("(a: .5 )b", [("a", 0.5), ("b", 1.0)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(:3)", []),
        ("\\\\ \\", [("\\ \\", 1.0)]),
    ],
)
def test_odd_brackets_have_a_meaning_or_stand_for_themselves(
    given: str, pieces: list[tuple[str, float]]
) -> None:
    found = weighted_pieces(given)
    assert [piece for piece, _ in found] == [piece for piece, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


@pytest.mark.parametrize("max_token_length", [75, 225])
def test_weights_multiply_the_states_of_their_tokens(
    tiny_folder: Path, max_token_length: int
) -> None:
    options = {"max_token_length": max_token_length}
    plain = encoded(load(tiny_folder, **options), "a red house")
    model = load(tiny_folder, **options, weighted_captions=True)
    weighted = encoded(model, "a (red:1.5) [house]")
    # BOS, a, red, house: each is one token, and the rest counts once.
    factors = torch.ones(max_token_length + 2, 1)
    factors[2], factors[3] = 1.5, 1 / 1.1
    torch.testing.assert_close(weighted["context"][0], plain["context"][0] * factors)
    assert torch.equal(weighted["pooled"], plain["pooled"])
    assert encoded(model, "a red house")["context"].equal(plain["context"])


def test_without_the_option_brackets_are_letters(tiny_folder: Path) -> None:
    model = load(tiny_folder)
    with torch.no_grad():
        literal = model.encode_text(["a (red:1.5) house"])["context"]
        prompt = model.encode_prompts(["a (red:1.5) house"])["context"]
    ids = text.tokenize(clip_tokenizer(), ["a (red:1.5) house"], num_chunks=1, padding=None)
    assert (ids != text.EOS).sum() == 1 + len(clip_tokenizer().tokenize("a (red:1.5) house"))
    assert not torch.allclose(literal, prompt)
    # Prompts of pictures have weights in any case, as in sd-scripts.
    assert prompt.equal(
        encoded(load(tiny_folder, weighted_captions=True), "a (red:1.5) house")["context"]
    )


def test_weights_stay_with_their_tokens_across_chunks(tiny_folder: Path) -> None:
    words = " ".join(["cat"] * 80)
    plain = encoded(load(tiny_folder, max_token_length=150), f"{words} dog")["context"]
    model = load(tiny_folder, max_token_length=150, weighted_captions=True)
    weighted = encoded(model, f"{words} (dog:2)")["context"]
    # 81st word: position 81, behind BOS.
    assert torch.allclose(weighted[0, 81], 2 * plain[0, 81])
    assert torch.equal(weighted[0, :81], plain[0, :81])


def test_counting_by_words_equals_counting_whole(golden: Callable[[str], Any]) -> None:
    tokenizer = clip_tokenizer()
    prompts = [row["prompt"] for row in golden("tokens")]
    odd = [
        "it's  the cat's, don't",
        "naïve 猫 犬,x",
        "<|endoftext|> a",
        "1girl123 !!! ...a",
        "\u00a0 b ",
    ]
    texts = [*prompts, *odd, LONG]
    whole = [len(ids) for ids in text.token_ids(tokenizer, texts)]
    assert text.count_tokens(tokenizer, texts, weighted=False) == whole
    weighted = [len(text.weighted_token_ids(tokenizer, line)[0]) for line in texts]
    assert text.count_tokens(tokenizer, texts, weighted=True) == weighted


def test_captions_are_counted_whole(tiny_folder: Path) -> None:
    tokenizer = clip_tokenizer()
    captions = ["a cat", LONG, "", "(cat:1.2)"]
    whole = [len(tokenizer.tokenize(caption)) for caption in captions]
    model = load(tiny_folder)
    assert model.count_tokens(captions) == whole
    assert model.count_tokens([]) == []
    assert model.max_tokens == 75
    assert whole[1] > 75
    weighted = load(tiny_folder, weighted_captions=True, max_token_length=225)
    assert weighted.count_tokens(captions) == [2, whole[1], 0, 1]
    assert weighted.max_tokens == 225


def test_the_layer_that_is_skipped_to_is_the_one_encoded(tiny_folder: Path) -> None:
    usual = load(tiny_folder)
    first = usual.text_encoders[0]
    ids = text.tokenize(usual.tokenizers[0], ["a cat"], num_chunks=1, padding=None)
    with torch.no_grad():
        states = first(input_ids=ids[:, 0], output_hidden_states=True).hidden_states
    width = states[-1].shape[-1]
    for clip_skip, layer in ((None, -2), (1, -1), (2, -2)):
        found = encoded(load(tiny_folder, clip_skip=clip_skip), "a cat")
        torch.testing.assert_close(found["context"][..., :width], states[layer])
        assert found["pooled"].equal(encoded(usual, "a cat")["pooled"])


def test_a_layer_that_is_not_there_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(UserError, match=r"clip_skip.*layer 12 from the last"):
        load(tiny_folder, clip_skip=12)


def test_what_shapes_the_encoding_is_part_of_its_identity(tiny_folder: Path) -> None:
    usual = load(tiny_folder).text_encoders_identity()
    for options in ({"clip_skip": 1}, {"weighted_captions": True}, {"max_token_length": 150}):
        (name,) = options
        other = load(tiny_folder, **options).text_encoders_identity()
        assert {key for key in usual if usual[key] != other[key]} == {name}
