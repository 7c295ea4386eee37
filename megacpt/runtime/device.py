"""The device a process computes on."""

from __future__ import annotations

import os
from functools import cache

import torch

from megacpt.errors import SetupError


@cache
def on_cuda() -> bool:
    """Whether this process computes on CUDA: it does where there is a GPU, unless MEGACPT_DEVICE=cpu."""
    wish = os.environ.get("MEGACPT_DEVICE", "auto")
    if wish not in ("auto", "cpu", "cuda"):
        raise SetupError(f"MEGACPT_DEVICE is '{wish}'; it may be auto, cpu or cuda")
    if wish == "cuda" and not torch.cuda.is_available():
        raise SetupError("MEGACPT_DEVICE=cuda, but torch finds no CUDA device on this machine")
    return wish == "cuda" or (wish == "auto" and torch.cuda.is_available())


def local_device() -> torch.device:
    """Return this rank's device: its own GPU (by LOCAL_RANK), or the CPU."""
    if not on_cuda():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
