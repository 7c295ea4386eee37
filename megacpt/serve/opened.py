"""Opening a folder that `convert` wrote for use: a decoder and its tokenizer."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from megacpt.convert.packed_folder import PackedFolder
from megacpt.data.tokenizer import Tokenizer
from megacpt.serve.decoder import Decoder
from megacpt.serve.linear import Activations

_log = logging.getLogger("megacpt.serve")


def open_decoder(
    path: Path, activations: Activations | None = None, device: torch.device | None = None
) -> tuple[Decoder, Tokenizer]:
    """Load a packed folder for generation.

    Args:
        path: the folder.
        activations: of the packed layers; None for ``int8`` where the model was trained so, else ``float``.
        device: where it computes; by default the CPU.

    Raises:
        CheckpointError: a file or a weight is missing, or of another model.
        ConfigError: it is a network that the decoder has no code for.
    """
    folder = PackedFolder(path)
    if activations is None:
        activations = "int8" if folder.activations == "int8" else "float"
    if folder.activations is not None:
        here = "with 8 bits for 256 of them" if activations == "int8" else "as they are"
        _log.warning(
            "%s was trained with the activations of each token in %s; here they are taken %s",
            path,
            folder.activations,
            here,
        )
    return Decoder(folder, activations, device), folder.tokenizer()
