from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.lab import Lab, lineage


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs by name: english, then python and python-0 on it, each with a release; to be read only."""
    return lineage(Lab(tmp_path_factory.mktemp("family")))
