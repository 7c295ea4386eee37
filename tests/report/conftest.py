from __future__ import annotations

from pathlib import Path

import pytest

from tests.report import lab as made
from tests.report.lab import Lab, lineage


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs by name: english, then python and python-0 on it, each with a release; to be read only."""
    return lineage(Lab(tmp_path_factory.mktemp("family")))


@pytest.fixture(scope="session")
def saga(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of a longer story by name; see `tests.report.lab.saga`. To be read only."""
    return made.saga(Lab(tmp_path_factory.mktemp("saga")))
