"""Proof of a conversion: the same tokens through transformers and through the engine, and how far the logits are apart.

Names and shapes can be right where numbers are in the wrong places (queries for keys, rows in another order of
rotation). Logits show it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from megacpt.checkpoint.store import find_checkpoint
from megacpt.config import ModelConfig
from megacpt.continuation.ledger import Ledger
from megacpt.continuation.opened import open_model
from megacpt.data.files import write_json
from megacpt.errors import CheckpointError, ConfigError
from megacpt.runtime.layout import world_size

CARD = "verification.json"
TOLERANCE = 1e-4
_HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_ROWS, _LENGTH, _LONGEST = 4, 64, 1024


@dataclass(frozen=True)
class Card:
    """What a verification found.

    Attributes:
        checkpoint: id of the ledger of the weights here.
        compared_with: name of the folder of Hugging Face.
        transformers: its version.
        tokens: how many predictions were compared.
        largest_difference: of two logits, in float32.
        largest_logit: magnitude, in transformers.
        divergence: mean Kullback-Leibler divergence of the predictions here from those there, in nats.
        same_choice: share of the predictions whose likeliest token is the same.
        tolerance: the largest difference that passes, as a share of the largest logit (of 1, if that is more).
    """

    checkpoint: str
    compared_with: str
    transformers: str
    tokens: int
    largest_difference: float
    largest_logit: float
    divergence: float
    same_choice: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether both compute the same function."""
        return self.largest_difference <= self.tolerance * max(1.0, self.largest_logit)

    def line(self) -> str:
        """Say it to a person."""
        word = "the same function" if self.passed else "NOT THE SAME FUNCTION"
        return (
            f"{word}: over {self.tokens} tokens logits differ by {self.largest_difference:.2g} at most (the largest is "
            f"{self.largest_logit:.3g}), KL {self.divergence:.2g}, same choice {self.same_choice:.1%}"
        )


def obstacle(checkpoint: Path) -> str | None:
    """Return why a checkpoint cannot be compared with transformers in this process; None if it can."""
    if find_spec("transformers") is None:
        return "transformers is not installed: pip install 'megacpt[hf]'"
    if world_size() > 1:
        return "it is for one process: run `megacpt convert verify` without torchrun"
    ledger = Ledger.read(find_checkpoint(checkpoint))
    model = ModelConfig.model_validate(ledger.model)
    if model.quantise is not None and model.quantise.activations != "none":
        return "the model rounds activations, and transformers does not"
    needed, free = 2.2 * 4 * model.parameters(ledger.tokenizer["vocab_size"]), psutil.virtual_memory().available
    if needed > free:
        return f"the model is needed twice in float32, {needed / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free"
    return None


def verify(run: Path, folder: Path, out: Path, tolerance: float = TOLERANCE) -> Card:
    """Run a checkpoint and a model of Hugging Face on the same tokens, in float32, and write down what came of it.

    Where one of both has its weights in 16 bits, those of the other are rounded likewise.

    Args:
        run: a checkpoint, or a run folder for its newest.
        folder: of Hugging Face.
        out: the folder that the card is written to.
        tolerance: see `Card.tolerance`.

    Raises:
        ConfigError: it cannot be done here, with the reason of `obstacle`.
        CheckpointError: the logits differ by more than the tolerance.
    """
    checkpoint = find_checkpoint(run)
    if (why := obstacle(checkpoint)) is not None:
        raise ConfigError(f"{run} cannot be compared with {folder}: {why}")
    ledger = Ledger.read(checkpoint)
    model = ModelConfig.model_validate(ledger.model)
    ids = _tokens(model, ledger)
    theirs, half = _their_logits(folder, ids, (ledger.derived or {}).get("dtype"))
    ours = _our_logits(checkpoint, ids, half if model.quantise is None else None)[..., : theirs.shape[-1]]
    card = _compared(ours, theirs, ledger.id, folder.resolve().name, tolerance)
    write_json(out / CARD, {**asdict(card), "passed": card.passed})
    if not card.passed:
        raise CheckpointError(f"{run} and {folder} are {card.line()}")
    return card


def _tokens(model: ModelConfig, ledger: Ledger) -> Tensor:
    """[rows, length] ids that are words: drawn once for all, beyond a window where there is one."""
    words = min(model.padded_vocab(ledger.tokenizer["vocab_size"]), ledger.tokenizer["vocab_size"])
    length = min(max(_LENGTH, math.ceil(1.5 * (model.window or 0))), _LONGEST, model.max_seq_length)
    return torch.randint(words, (_ROWS, length), generator=torch.Generator().manual_seed(0))


def _their_logits(folder: Path, ids: Tensor, kept: str | None) -> tuple[Tensor, torch.dtype | None]:
    """Return logits [b, s, V], and the dtype of 16 bits in which the weights lie there.

    Args:
        folder: of Hugging Face.
        ids: [b, s].
        kept: the dtype in which the weights were kept here.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).dtype
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    half = found if found in _HALVES.values() else None
    if half is None and kept in _HALVES:
        _round(model, _HALVES[kept])
    with torch.no_grad():
        logits: Tensor = model.eval()(ids).logits
    return logits.float(), half


def _our_logits(checkpoint: Path, ids: Tensor, half: torch.dtype | None) -> Tensor:
    """Logits [b, s, V], of weights rounded to `half`."""
    engine, _, _ = open_model(checkpoint, overrides=["precision=float32"])
    (model,) = engine.chunks
    if half is not None:
        _round(model, half)
    with torch.no_grad():
        logits: Tensor = model.eval()(ids, None, None)
    return logits.float()


def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the parameters of a model in float32."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(dtype))


def _compared(ours: Tensor, theirs: Tensor, checkpoint: str, folder: str, tolerance: float) -> Card:
    """Compare logits [b, s, V], a sequence at a time."""
    apart, divergence, same = 0.0, 0.0, 0
    for mine, other in zip(ours, theirs, strict=True):
        difference = float((mine - other).abs().max())
        apart = max(apart, difference) if math.isfinite(difference) else math.inf
        p, q = (logits.double().log_softmax(-1) for logits in (other, mine))
        divergence += float((p.exp() * (p - q)).sum())
        same += int((mine.argmax(-1) == other.argmax(-1)).sum())
    tokens = ours.shape[0] * ours.shape[1]
    return Card(
        checkpoint=checkpoint,
        compared_with=folder,
        transformers=version("transformers"),
        tokens=tokens,
        largest_difference=apart,
        largest_logit=float(theirs.abs().max()),
        divergence=divergence / tokens,
        same_choice=same / tokens,
        tolerance=tolerance,
    )
