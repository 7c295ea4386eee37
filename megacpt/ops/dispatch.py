"""Which implementation of an op runs: CUDA before Triton before compiled CPU before the torch reference.

`MEGACPT_KERNELS` chooses: ``auto`` (the default) takes the best that is there, ``reference`` takes torch alone,
``native`` refuses to run without a kernel.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch

from megacpt.errors import SetupError, nearest

Backend = Literal["cuda", "triton", "cpu"]
Mode = Literal["auto", "native", "reference"]

VARIABLE = "MEGACPT_KERNELS"
_ORDER: tuple[Backend, ...] = ("cuda", "triton", "cpu")
_MODES: tuple[Mode, ...] = ("auto", "native", "reference")
_log = logging.getLogger("megacpt.ops")

T = TypeVar("T")


@dataclass(frozen=True)
class Kernel(Generic[T]):
    """A native implementation of an op.

    Attributes:
        backend: what it is built with.
        dtypes: what it computes.
        load: returns its functions; raises SetupError, with the reason and the remedy, where they can't be had.
    """

    backend: Backend
    dtypes: frozenset[torch.dtype]
    load: Callable[[], T]

    @property
    def device(self) -> str:
        """The type of device that it runs on."""
        return "cpu" if self.backend == "cpu" else "cuda"


@dataclass(frozen=True)
class Choice(Generic[T]):
    """What runs: `functions` of `backend`, and where that is the reference, why.

    `fallback` says that a kernel was wanted and is missing.
    """

    functions: T
    backend: Backend | Literal["reference"]
    why: str = ""
    fallback: bool = False


class FusedOp(Generic[T]):
    """An op with its reference and its kernels.

    Args:
        name: the op's name in messages.
        reference: the torch functions that define the op, for every device and dtype.
        fallback_cost: what it costs to run the reference instead of a kernel, in words.
        kernels: the native implementations.
    """

    def __init__(self, name: str, reference: T, fallback_cost: str, kernels: tuple[Kernel[T], ...]) -> None:
        self.name = name
        self.reference = reference
        self.fallback_cost = fallback_cost
        self.kernels = tuple(sorted(kernels, key=lambda kernel: _ORDER.index(kernel.backend)))
        self._chosen: dict[tuple[Mode, str, torch.dtype], Choice[T]] = {}

    def choose(self, device: str, dtype: torch.dtype) -> Choice[T]:
        """The implementation for tensors of `dtype` on a type of device; a fallback is logged, once.

        float64 is the reference's alone in every mode: kernels are written for the dtypes of training.

        Raises:
            SetupError: `MEGACPT_KERNELS` is unknown, or asks for a kernel that is missing.
        """
        key = (kernel_mode(), device, dtype)
        if key not in self._chosen:
            choice = self._chosen[key] = self.find(*key)
            if choice.fallback:
                _log.warning("%s runs on the torch reference, %s: %s", self.name, self.fallback_cost, choice.why)
        return self._chosen[key]

    def find(self, mode: Mode, device: str, dtype: torch.dtype) -> Choice[T]:
        """What `choose` takes in a mode, without a word in the log."""
        if mode == "reference":
            return Choice(self.reference, "reference", f"{VARIABLE}=reference")
        if dtype is torch.float64:
            return Choice(self.reference, "reference", "float64 is computed by the reference alone")
        reasons = []
        for kernel in self.kernels:
            if kernel.device == device and dtype in kernel.dtypes:
                try:
                    return Choice(kernel.load(), kernel.backend)
                except SetupError as missing:
                    reasons.append(str(missing))
        why = "; ".join(reasons) or f"there is no kernel for {str(dtype).removeprefix('torch.')} on {device}"
        if mode == "native":
            raise SetupError(f"{VARIABLE}=native, but {self.name} has no kernel: {why}")
        return Choice(self.reference, "reference", why, fallback=True)


def kernel_mode() -> Mode:
    """The mode that `MEGACPT_KERNELS` asks for."""
    wanted = os.environ.get(VARIABLE, "auto")
    for mode in _MODES:
        if wanted == mode:
            return mode
    raise SetupError(f"{VARIABLE}={wanted}: must be one of {', '.join(_MODES)}{nearest(wanted, _MODES)}")
