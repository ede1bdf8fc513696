"""SDXL's text conditioning: tokens in chunks, two encoders, one context.

A text encoder of CLIP takes 77 tokens: a first one, 75 of text, a last one. Longer texts are cut
into chunks of 75 that are encoded apart and joined again.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import LongTensor, Tensor
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TEXT_ENCODER_PADDING: Final = (None, 0)
"""The token that fills up the texts of each encoder, as :func:`tokenize` takes it."""
CHUNK_TOKENS: Final = 75
"""Tokens of text in a chunk, without the first and last one."""
BOS: Final = 49406
EOS: Final = 49407
"""First and last token of a text in CLIP's vocabulary."""


def tokenize(
    tokenizer: CLIPTokenizer, captions: Sequence[str], *, num_chunks: int, padding: int | None
) -> LongTensor:
    """Turn captions into chunks of token ids: int64 [B, num_chunks, 77].

    Text encoder 1 pads with the last token of a text (``padding`` None), text encoder 2 with 0.
    """
    words = tokenizer(
        list(captions),
        add_special_tokens=False,
        truncation=True,
        max_length=CHUNK_TOKENS * num_chunks,
    )
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    filler = eos if padding is None else padding
    chunks = [
        chunk_tokens(ids, num_chunks=num_chunks, padding=filler, bos=bos, eos=eos)
        for ids in words.input_ids
    ]
    return torch.tensor(chunks)  # type: ignore[return-value]


def identity(tokenizer: CLIPTokenizer) -> str:
    """Give all that decides which tokens a tokenizer makes of a text.

    How the last call cut and padded, which a tokenizer remembers, is no part of it.
    """
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({**document, "truncation": None, "padding": None})


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
    encoder: CLIPTextModel | CLIPTextModelWithProjection, ids: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Encode chunks of token ids, int64 [B, n, 77].

    Returns:
        The second-to-last hidden states without a final norm, joined: [B, 75 n + 2, width]; and, if
        the encoder has a projection, that of the first chunk at its first EOS: [B, pooled width].
    """
    batch, num_chunks, _ = ids.shape
    output = encoder(input_ids=ids.flatten(0, 1), output_hidden_states=True)
    states = output.hidden_states[-2].unflatten(0, (batch, num_chunks))
    inner = states[:, :, 1:-1].flatten(1, 2)
    joined = torch.cat([states[:, 0, :1], inner, states[:, -1, -1:]], dim=1)
    projected = getattr(output, "text_embeds", None)
    pooled = None if projected is None else projected.unflatten(0, (batch, num_chunks))[:, 0]
    return joined, pooled
