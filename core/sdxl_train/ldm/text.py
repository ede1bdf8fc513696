"""Texts for CLIP's encoders: tokens in chunks, weights of words, the states of a layer.

A text encoder of CLIP takes 77 tokens: a first one, 75 of text, a last one. Longer texts are cut
into chunks of 75 that are encoded apart and joined again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from sdxl_train.ldm.prompt_weights import weighted_pieces

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import LongTensor, Tensor
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

PADDING: Final = {None: None, "!": 0}
"""The token that fills up texts, as :func:`tokenize` takes it, by the name it has."""
CHUNK_TOKENS: Final = 75
"""Tokens of text in a chunk, without the first and last one."""
BOS: Final = 49406
EOS: Final = 49407
"""First and last token of a text in CLIP's vocabulary."""


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How captions are read.

    Attributes:
        num_chunks: Chunks of 75 tokens that a caption may fill.
        clip_skip: Which layer's states are taken, counted from the last one as 1.
        weighted: Whether captions have weights in them: ``(word:1.2)``.
        final_norm: Whether the encoder's last norm comes after that layer.
    """

    num_chunks: int = 1
    clip_skip: int
    weighted: bool = False
    final_norm: bool

    @property
    def max_tokens(self) -> int:
        """Tokens of a caption that are read."""
        return CHUNK_TOKENS * self.num_chunks


def token_ids(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Give the tokens of each text, all of them, without a first and a last one."""
    if not texts:
        return []
    # Not verbose: or it warns of texts that are too long for one chunk, which is not so here.
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
    return ids


def count_tokens(tokenizer: CLIPTokenizer, texts: Sequence[str], *, weighted: bool) -> list[int]:
    """Count the tokens of each text.

    No token reaches across a blank, so each word is looked at once: whole captions of 100 000
    images take ten seconds and more.
    """
    split = [
        [word for piece, _ in weighted_pieces(text) for word in piece.split()]
        if weighted
        else text.split()
        for text in texts
    ]
    words = sorted({word for text in split for word in text})
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(words, add_special_tokens=False)
    lengths = dict(zip(words, map(len, encoded), strict=True))
    return [sum(map(lengths.__getitem__, text)) for text in split]


def weighted_token_ids(tokenizer: CLIPTokenizer, text: str) -> tuple[list[int], list[float]]:
    """Give the tokens of a text with weights in it, and the weight of each."""
    pieces = weighted_pieces(text)
    parts = token_ids(tokenizer, [piece for piece, _ in pieces])
    ids = [number for part in parts for number in part]
    weights = [
        weight for part, (_, weight) in zip(parts, pieces, strict=True) for _ in range(len(part))
    ]
    return ids, weights


def weights_of(texts: Sequence[Sequence[float]], *, num_chunks: int) -> Tensor:
    """Give the weights of all positions: fp32 [B, 75 num_chunks + 2, 1], 1 where no text is."""
    length = CHUNK_TOKENS * num_chunks
    rows = [[1.0, *weights[:length], *[1.0] * (length - len(weights)), 1.0] for weights in texts]
    return torch.tensor(rows).unsqueeze(-1)


def tokenize(
    tokenizer: CLIPTokenizer, captions: Sequence[str], *, num_chunks: int, padding: int | None
) -> LongTensor:
    """Turn captions into chunks of token ids: int64 [B, num_chunks, 77].

    The last token of a text fills it up (``padding`` None), or the one given.
    """
    return in_chunks(
        tokenizer, token_ids(tokenizer, captions), num_chunks=num_chunks, padding=padding
    )


def in_chunks(
    tokenizer: CLIPTokenizer,
    texts: Sequence[Sequence[int]],
    *,
    num_chunks: int,
    padding: int | None,
) -> LongTensor:
    """Put the tokens of texts into chunks, as :func:`tokenize` does."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    filler = eos if padding is None else padding
    chunks = [
        chunk_tokens(ids, num_chunks=num_chunks, padding=filler, bos=bos, eos=eos) for ids in texts
    ]
    return torch.tensor(chunks)  # type: ignore[return-value]


def identity(tokenizer: CLIPTokenizer) -> str:
    """Give all that decides which tokens a tokenizer makes of a text.

    How the last call cut and padded, which a tokenizer remembers, is no part of it.
    """
    backend = tokenizer.backend_tokenizer
    text: str = backend.to_str()
    if backend.truncation is None and backend.padding is None:
        return text
    plain = {**json.loads(text), "truncation": None, "padding": None}
    return json.dumps(plain, separators=(",", ":"), ensure_ascii=False)


def chunk_tokens(
    tokens: Sequence[int], *, num_chunks: int, padding: int, bos: int = BOS, eos: int = EOS
) -> list[list[int]]:
    """Cut the tokens of one text into chunks of 77 ids, as sd-scripts does.

    A single chunk ends as the text does. Of several, each begins with BOS and ends with the last
    token of the padded text, or with EOS where it is full; a chunk without text begins its text
    with EOS. (A genuine token 0 at the start of a chunk is therefore replaced too.)
    """
    length = CHUNK_TOKENS * num_chunks + 2
    padded = [bos, *tokens[: length - 2], eos]
    padded += [padding] * (length - len(padded))
    if num_chunks == 1:
        return [padded]
    chunks = []
    for start in range(1, length - 1, CHUNK_TOKENS):
        chunk = [bos, *padded[start : start + CHUNK_TOKENS], padded[-1]]
        if chunk[-2] not in (eos, padding):
            chunk[-1] = eos
        if chunk[1] == padding:
            chunk[1] = eos
        chunks.append(chunk)
    return chunks


def encode(
    encoder: CLIPTextModel | CLIPTextModelWithProjection,
    ids: Tensor,
    *,
    layer: int,
    final_norm: bool,
) -> tuple[Tensor, Tensor | None]:
    """Encode chunks of token ids, int64 [B, n, 77].

    Args:
        encoder: The text encoder.
        ids: The tokens.
        layer: Whose states are taken, counted from the last one as 1.
        final_norm: Whether the encoder's last norm comes after that layer.

    Returns:
        The hidden states of the layer, joined: [B, 75 n + 2, width]; and, if the encoder has a
        projection, that of the first chunk at its first EOS: [B, pooled width].
    """
    batch, num_chunks, _ = ids.shape
    output = encoder(input_ids=ids.flatten(0, 1), output_hidden_states=True)
    states = output.hidden_states[-layer]
    if final_norm:
        # transformers has no `text_model` in CLIPTextModel since 5.6.
        states = getattr(encoder, "text_model", encoder).final_layer_norm(states)
    states = states.unflatten(0, (batch, num_chunks))
    inner = states[:, :, 1:-1].flatten(1, 2)
    joined = torch.cat([states[:, 0, :1], inner, states[:, -1, -1:]], dim=1)
    projected = getattr(output, "text_embeds", None)
    pooled = None if projected is None else projected.unflatten(0, (batch, num_chunks))[:, 0]
    return joined, pooled
