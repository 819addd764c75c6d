"""Textual inversion: a learned word, whose vectors stand in a small file. Gal et al., arXiv 2208.01618.

The vectors become further rows of the text encoder's table. A word of several vectors takes as many places in a row of
tokens, as in diffusers.
"""
from dataclasses import replace
from pathlib import Path

import torch

from tinytav.errors import InputError

TABLE = "embeddings.token_embedding.weight"


def parse(tensors, path):
    """All tensors of an embedding's file -> (its word, vectors (n, d)). Raises InputError for other kinds of files.

    diffusers names the tensor by the word. The web UI's name is `emb_params`; there the file's name is the word.
    """
    path = Path(path)
    if "clip_g" in tensors:
        raise InputError(f"{path} is an embedding for SDXL, because it holds clip_g.")
    if len(tensors) != 1:
        raise InputError(f"{path} is not an embedding: it holds {len(tensors)} tensors, not one.")
    (word, vectors), = tensors.items()
    word = path.stem if word == "emb_params" else word
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.ndim != 2 or len(vectors) == 0 or not vectors.is_floating_point() or not vectors.isfinite().all():
        raise InputError(f"{path} is not an embedding: it holds {word!r}, {tuple(vectors.shape)}, not finite vectors.")
    if not word.strip():
        raise InputError(f"{path} does not name its word.")
    return word, vectors


def add(word, vectors, tokenizer, config, tensors, where):
    """The text encoder's part (config, tensors, where) with n further rows. The tokenizer learns the word."""
    name = next((name for name in tensors if name.endswith(TABLE)), None)
    if name is None or tensors[name].shape[1:] != vectors.shape[1:]:
        raise InputError(f"The embedding {word!r} is {vectors.shape[1]} wide, the text encoder {config.hidden_size}: "
                         "an embedding for Stable Diffusion 1.x does not fit 2.x, nor the other way round.")
    tokenizer.add(word, len(vectors))
    table = torch.cat([tensors[name], vectors.to(tensors[name].dtype)])
    return replace(config, vocab_size=config.vocab_size + len(vectors)), tensors | {name: table}, where
