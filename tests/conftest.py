"""Fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.pool import Pools

os.environ.setdefault("MEGACPT_DEVICE", "cpu")


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """Worker pools by number of ranks: ``pools(4).run("tests.distributed.cases:train", ...)``."""
    shared = Pools()
    yield shared
    shared.close()
