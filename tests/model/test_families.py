"""Small random models of public families compute here what they do in transformers."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

from tests.model.families import FAMILIES
from tests.pool import Pools

needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")


@needs_transformers
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(pools: Pools, family: str) -> None:
    (found,) = pools(1).run("tests.model.family_cases:beside_transformers", family=family)
    ours, theirs = found["logits"]
    assert np.abs(theirs).max() > 0.5
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    built, counted = found["parameters"]
    assert built == counted
