"""Lists of matrices to quantise, drawn for tests of several implementations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from megacpt.ops.ternarise import Functions
from megacpt.ops.ternarise_reference import Blocks


@dataclass(frozen=True)
class TernaryList:
    """Matrices to be quantised, and what their values were before."""

    weights: list[Tensor]
    blocks: list[Blocks]
    scales: list[Tensor]
    former: list[Tensor]

    def ternarised(self, functions: Functions) -> list[Tensor]:
        """Return the counts, the values and the packed codes that an implementation gives."""
        outs = [values.clone() for values in self.former]
        packed = [torch.full((*w.shape[:-1], -(-w.shape[-1] // 4)), 255, dtype=torch.uint8) for w in self.weights]
        halves = [at.halves for at in self.blocks]
        return [functions.ternarise(self.weights, self.scales, outs, halves, packed), *outs, *packed]

    def packed_alone(self, functions: Functions) -> list[Tensor]:
        """Return the counts and the packed codes that an implementation gives where no values are wanted."""
        packed = [torch.full((*w.shape[:-1], -(-w.shape[-1] // 4)), 255, dtype=torch.uint8) for w in self.weights]
        halves = [at.halves for at in self.blocks]
        return [functions.ternarise(self.weights, self.scales, None, halves, packed), *packed]


@st.composite
def ternary_lists(draw: st.DrawFn, most: int = 6) -> TernaryList:
    """Draw matrices of all shapes and formats; some hold NaN, infinities, subnormals, or lie askew in memory."""
    formats = [(torch.float32, d) for d in (torch.float32, torch.bfloat16, torch.float16)]
    dtype, out_dtype = draw(st.sampled_from([*formats, (torch.bfloat16,) * 2, (torch.float16,) * 2]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weights, blocks, scales, former = [], [], [], []
    for _ in range(draw(st.integers(1, most))):
        at = Blocks(draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from((1, 2))))
        rows = at.rows * at.halves * draw(st.sampled_from((1, 2, 5)))
        width = at.columns * draw(st.sampled_from((1, 3, 8, 16, 40, 128, 130, 264)))
        lead = draw(st.sampled_from(((), (), (3,))))
        numbers = math.prod(lead) * rows * width
        askew = draw(st.sampled_from((0, 0, 1)))
        flat = torch.randn(numbers + askew, generator=generator) * draw(st.sampled_from((1.0, 1e-40, 1e4)))
        for value in (math.nan, math.inf):
            if draw(st.booleans()):
                flat[draw(st.integers(0, len(flat) - 1))] = value
        weights.append(flat.to(dtype)[askew:].view(*lead, rows, width))
        mean = weights[-1].float().abs().nan_to_num(0.0, 0.0).mean().clamp(min=2.0**-148)
        scales.append(mean * (0.5 + torch.rand(*lead, at.rows, at.columns, generator=generator)))
        values = torch.randint(-1, 2, (*lead, rows, width), generator=generator)
        former.append((values * mean).to(out_dtype))
        blocks.append(at)
    return TernaryList(weights, blocks, scales, former)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in every bit, whatever the payload of a NaN; 0 and -0 do not."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = [x.nan_to_num(0.0, math.inf, -math.inf).view(sizes[x.element_size()]) for x in (a, b)]
    return a.dtype is b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(*bits)
