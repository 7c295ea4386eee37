"""Whether the tensors of a folder are those of the network that its config.json describes; told before any is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import torch

from megacpt.convert.families import Source, Target
from megacpt.convert.weight_files import BLOCK, SCALE, WeightFiles
from megacpt.errors import CheckpointError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
_SHOWN = 8  # problems that are named


def check_tensors(weights: WeightFiles, sources: Iterable[Source], ignored: Mapping[str, str]) -> list[str]:
    """Compare names, shapes and dtypes.

    Args:
        weights: the files.
        sources: what the network has.
        ignored: regular expressions of names that need not be taken, with the reason.

    Returns:
        What is left out, a line for each reason.

    Raises:
        CheckpointError: names every tensor that is missing, of another shape or dtype, or unknown, with its file and
            what is due.
    """
    due = {target.name: target for source in sources for target in source.targets}
    problems = [problem for target in due.values() for problem in _problems(weights, target)]
    left_out: Counter[str] = Counter()
    for name, stored in weights.tensors.items():
        if name in due or (name.endswith(SCALE) and name.removesuffix(SCALE) in weights.tensors):
            continue
        reason = next((text for pattern, text in ignored.items() if re.fullmatch(pattern, name)), None)
        if reason is None:
            shape = list(stored.shape)
            problems.append(
                f"{stored.file.name}: {name} {shape} is no tensor of the network that config.json describes"
            )
        else:
            left_out[reason] += 1
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        folder = weights.files[0].parent
        raise CheckpointError("\n".join([f"the tensors of {folder} do not fit:", *problems[:_SHOWN], *more]))
    return [f"left out, {reason}: {count} tensors" for reason, count in sorted(left_out.items())]


def _problems(weights: WeightFiles, target: Target) -> Iterator[str]:
    stored = weights.tensors.get(target.name)
    if stored is None:
        yield f"{target.name} {list(target.shape)} is missing in all {len(weights.files)} files"
        return
    where = f"{stored.file.name}: {target.name}"
    if stored.shape != target.shape:
        yield f"{where} is {list(stored.shape)}, and {list(target.shape)} is due"
    elif stored.dtype in _EIGHT_BITS:
        yield from _scale_problems(weights, where, target)
    elif stored.dtype not in FLOATS:
        kind = str(stored.dtype).removeprefix("torch.")
        yield f"{where} is {kind}, and weights are floating-point numbers: packed or quantised forms are not read"


def _scale_problems(weights: WeightFiles, where: str, target: Target) -> Iterator[str]:
    scale = weights.tensors.get(target.name + SCALE)
    shape = tuple(-(-size // BLOCK) for size in target.shape)
    if scale is None:
        yield f"{where} is in 8 bits, and {target.name + SCALE} {list(shape)} is missing, which it is multiplied with"
    elif scale.shape != shape:
        text = f"a number for each {BLOCK} x {BLOCK} weights"
        yield f"{where + SCALE} is {list(scale.shape)}, and {list(shape)} is due, {text}"
