"""Where a process computes, and which layout its ranks have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megacpt.config import ParallelConfig
from megacpt.errors import LayoutError, SetupError
from megacpt.runtime import layout
from megacpt.runtime.device import local_device, on_cuda
from megacpt.runtime.layout import Layout


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that says whether MEGACPT_DEVICE=WISH on a machine with or without GPUs means CUDA."""

    def ask(wish: str | None, gpus: bool) -> bool:
        if wish is None:
            monkeypatch.delenv("MEGACPT_DEVICE", raising=False)
        else:
            monkeypatch.setenv("MEGACPT_DEVICE", wish)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
        on_cuda.cache_clear()
        return on_cuda()

    yield ask
    on_cuda.cache_clear()


@pytest.mark.parametrize(
    ("wish", "gpus", "cuda"),
    [
        (None, True, True),
        (None, False, False),
        ("auto", True, True),
        ("auto", False, False),
        ("cpu", True, False),
        ("cpu", False, False),
        ("cuda", True, True),
    ],
)
def test_the_device(device: Any, wish: str | None, gpus: bool, cuda: bool) -> None:
    assert device(wish, gpus) is cuda


def test_each_rank_has_its_own_gpu(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    device("cuda", True)
    assert local_device() == torch.device("cuda", 3)
    device("cpu", True)
    assert local_device() == torch.device("cpu")


@pytest.mark.parametrize("wish", ["gpu", "", "CUDA", "cuda:1"])
def test_a_device_that_is_none(device: Any, wish: str) -> None:
    with pytest.raises(SetupError, match=rf"MEGACPT_DEVICE is '{wish}'; it may be auto, cpu or cuda"):
        device(wish, True)


def test_cuda_where_there_is_none(device: Any) -> None:
    with pytest.raises(SetupError, match="MEGACPT_DEVICE=cuda, but torch finds no CUDA device"):
        device("cuda", False)


SIZES = st.integers(1, 8)


@given(SIZES, SIZES, SIZES, SIZES)
def test_data_parallelism_is_what_remains(tensor: int, pipeline: int, context: int, data: int) -> None:
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, context=context)
    found = Layout.of(parallel, tensor * pipeline * context * data)
    assert (found.tensor, found.pipeline, found.context, found.data) == (tensor, pipeline, context, data)


def test_a_world_that_does_not_divide() -> None:
    with pytest.raises(LayoutError) as error:
        Layout.of(ParallelConfig(tensor=2, pipeline=2), 6)
    assert str(error.value) == (
        "parallel: tensor 2 x pipeline 2 x context 1 = 4 ranks do not divide the 6 ranks that were started; "
        "start a multiple of 4"
    )
    with pytest.raises(LayoutError, match="do not divide the 1 ranks"):
        Layout.of(ParallelConfig(context=2), 1)


def test_a_layout_in_words() -> None:
    assert str(Layout()) == "tp1 pp1 cp1 dp1"
    whole = Layout(
        tensor=2, pipeline=4, virtual_pipeline=2, context=2, data=3, sequence=True, distributed_optimizer=True
    )
    assert str(whole) == "tp2 pp4 vpp2 cp2 dp3 sp distopt"


def test_ranks_without_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a group is joined the launcher's environment tells how many there are."""
    assert layout.is_first_rank()
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert layout.world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert layout.world_size() == 8
