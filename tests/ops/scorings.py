"""Ways to score experts that tests of the router draw from."""

from __future__ import annotations

from hypothesis import strategies as st

from megacpt.ops.router_reference import Scoring


def scorings(experts: int, most: int) -> st.SearchStrategy[Scoring]:
    """Every kind of scoring that fits a number of experts, with up to nine or `most` of them chosen."""
    chosen = st.integers(1, min(experts, 9)) | st.just(min(experts, most))
    plain = st.builds(
        Scoring, chosen, st.sampled_from(("softmax", "sigmoid")), st.booleans(), st.sampled_from((1, 2.5))
    )
    return plain | plain.filter(lambda s: s.top_k % 2 == 0 and experts % 4 == 0 and s.top_k <= experts // 2).map(
        lambda s: Scoring(s.top_k, s.score, s.renormalise, s.scale, groups=4, groups_kept=2)
    )
