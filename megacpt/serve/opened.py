"""Opening a folder that `convert` wrote for use: a decoder and its tokenizer."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from megacpt.convert.packed_folder import PackedFolder
from megacpt.data.tokenizer import Tokenizer
from megacpt.errors import ConfigError
from megacpt.serve.decoder import Decoder
from megacpt.serve.linear import Activations

_log = logging.getLogger("megacpt.serve")
_HERE = {
    "float": "they are multiplied as they are",
    "int8": "they are rounded to 8 bits by blocks of 256",
    "fp8": "they are rounded to float8, token by token",
}


def open_decoder(
    path: Path, activations: Activations | None = None, device: torch.device | None = None
) -> tuple[Decoder, Tokenizer]:
    """Load a packed folder for generation: in float32 on the CPU, in bfloat16 on CUDA.

    Args:
        path: the folder.
        activations: of the packed layers; None for those of training, as far as the device has them, else ``float``.
        device: where it computes; by default the CPU.

    Raises:
        CheckpointError: a file or a weight is missing, or of another model.
        ConfigError: it is a network that the decoder has no code for, or `activations` that it can't have here.
    """
    folder, device = PackedFolder(path), device or torch.device("cpu")
    if activations is None:
        chosen = _as_trained(folder, device)
    else:
        chosen = activations
        _check(folder, chosen, device)
    trained = folder.activations
    if trained is not None and (trained, chosen) != ("fp8", "fp8"):
        _log.warning(
            "%s was trained with the activations of each token rounded to %s; here %s", path, trained, _HERE[chosen]
        )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Decoder(folder, chosen, device, dtype), folder.tokenizer()


def _as_trained(folder: PackedFolder, device: torch.device) -> Activations:
    """What comes nearest to training."""
    if not folder.format.has_product or (folder.activations == "int8" and device.type == "cuda"):
        return "float"
    return folder.activations or "float"


def _check(folder: PackedFolder, activations: Activations, device: torch.device) -> None:
    """Refuse what would do nothing, or be no faster for being less exact."""
    if activations != "float" and not folder.format.has_product:
        raise ConfigError(
            f"--activations {activations}: the weights of {folder.path} are {folder.format.name}, and codes of more "
            "than two bits are multiplied as whole matrices, whose activations are not rounded: leave it out"
        )
    if activations == "int8" and device.type == "cuda":
        raise ConfigError(
            "--activations int8: CUDA has no kernel for it; leave it out, or compute on the CPU (--device cpu)"
        )
