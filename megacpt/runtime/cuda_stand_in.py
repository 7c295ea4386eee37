# ruff: noqa: ARG001  the signatures are torch.cuda's
"""What Megatron Core asks of ``torch.cuda``, answered for a machine that computes on the CPU.

Megatron's modules see this module under the name ``torch.cuda`` (see `megatron_cpu`). Only what training and
checkpointing reach is here; anything else raises with its name, so that a gap is a clear error and never a
silent difference. Classes (streams, graphs, pools) that Megatron mentions in annotations are passed through.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from megacpt.errors import SetupError

CPU = torch.device("cpu")


class Stream:
    """A stream on which everything has already happened."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = CPU

    def synchronize(self) -> None:
        """Return at once: work on the CPU is finished when its call returns."""

    def wait_stream(self, _stream: Any) -> None:
        """Return at once."""

    def wait_event(self, _event: Any) -> None:
        """Return at once."""

    def record_event(self, event: Event | None = None) -> Event:
        """Return an event that has been recorded now."""
        event = event or Event()
        event.record()
        return event


class Event:
    """A point in host time."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.seconds = 0.0

    def record(self, _stream: Any = None) -> None:
        """Remember the present moment."""
        self.seconds = time.perf_counter()

    def wait(self, _stream: Any = None) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Say that the event has happened."""
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to `end`."""
        return (end.seconds - self.seconds) * 1000.0


_STREAM = Stream()


def current_device() -> torch.device:
    """Return the device on which Megatron is to create its tensors."""
    return CPU


def current_stream(device: Any = None) -> Stream:
    """Return the one stream there is."""
    return _STREAM


default_stream = current_stream


@contextlib.contextmanager
def stream(_stream: Any) -> Iterator[None]:
    """Do nothing around the body: there is one stream."""
    yield


device = stream


def set_stream(_stream: Any) -> None:
    """Do nothing: there is one stream."""


def set_device(device: Any) -> None:
    """Do nothing: there is one device."""


def synchronize(device: Any = None) -> None:
    """Return at once."""


def empty_cache() -> None:
    """Do nothing: the CPU allocator keeps no cache worth emptying."""


def is_available() -> bool:
    """Say that there is no CUDA."""
    return False


def device_count() -> int:
    """Return 0: there is no CUDA device."""
    return 0


def get_device_capability(device: Any = None) -> tuple[int, int]:
    """Return (0, 0), below every capability that Megatron tests for."""
    return (0, 0)


def memory_allocated(device: Any = None) -> int:
    """Return 0: host memory is not accounted here."""
    return 0


memory_reserved = max_memory_allocated = memory_allocated


def memory_stats(device: Any = None) -> dict[str, int]:
    """Return no statistics."""
    return {}


def manual_seed(seed: int) -> None:
    """Seed the CPU generator, which plays the device's part."""
    torch.manual_seed(seed)


def get_rng_state(device: Any = None) -> torch.Tensor:
    """Return the state of the CPU generator."""
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
    """Set the state of the CPU generator."""
    torch.set_rng_state(state)


def _lazy_call(call: Callable[[], Any], **_: Any) -> None:
    call()


def _lazy_init() -> None:
    """Do nothing: there is no CUDA context to create."""


class _Generators:
    """The CPU's one generator, whichever device index is asked for."""

    def __getitem__(self, _device: Any) -> torch.Generator:
        return torch.default_generator


default_generators = _Generators()
random = SimpleNamespace(get_rng_state=get_rng_state, set_rng_state=set_rng_state, manual_seed=manual_seed)
nvtx = SimpleNamespace(range_push=lambda *_: None, range_pop=lambda *_: None, range=lambda *_: contextlib.nullcontext())
amp = SimpleNamespace(custom_fwd=lambda fwd=None, **_: fwd, custom_bwd=lambda bwd=None, **_: bwd)


def __getattr__(name: str) -> Any:
    real = getattr(torch.cuda, name, None)
    if isinstance(real, type) or (real is not None and name == "memory"):
        return real
    if name.startswith("__"):
        raise AttributeError(name)
    raise SetupError(
        f"Megatron Core asked for torch.cuda.{name}, which the CPU adapter does not answer. "
        "The feature in use needs a GPU, or megacpt/runtime/cuda_stand_in.py must learn this function."
    )
