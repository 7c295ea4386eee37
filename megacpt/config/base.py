"""What all configuration sections share: frozen, typed, no unknown keys, and mistakes that name their key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from megacpt.config.quantities import Duration


class Section(BaseModel):
    """A section of a configuration file: immutable, and without keys beyond those declared."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


@dataclass(frozen=True)
class Problem:
    """One mistake: the dotted key (relative to where it was found) and what to change."""

    key: str
    text: str

    def under(self, prefix: str) -> Problem:
        """The same problem with its key below `prefix`."""
        return Problem(".".join(part for part in (prefix, self.key) if part), self.text)

    def __str__(self) -> str:
        return f"{self.key}: {self.text}" if self.key else self.text


PROBLEMS = "megacpt_problems"


def raise_problems(problems: Sequence[Problem]) -> None:
    """Inside a pydantic validator: report all `problems`, each under its own key; do nothing without any."""
    if problems:
        text = "; ".join(map(str, problems)).replace("{", "{{").replace("}", "}}")
        raise PydanticCustomError(PROBLEMS, text, {"problems": list(problems)})


def _refuse_bool(value: Any) -> Any:
    # pydantic reads true as 1, which is never what a person means by `layers: true`.
    if isinstance(value, bool):
        raise ValueError("this must be a number, not true or false")
    return value


def _path(value: Any) -> Any:
    if isinstance(value, str):
        if not value.strip():
            raise ValueError("this must be a path, not an empty text")
        return Path(value).expanduser()
    return value


def _positive(value: Duration) -> Duration:
    if value.amount == 0:
        raise ValueError("this must be more than zero: write a duration such as '500 steps', '20M tokens' or 1%")
    return value


Count = Annotated[int, BeforeValidator(_refuse_bool)]
Number = Annotated[float, BeforeValidator(_refuse_bool)]
LocalPath = Annotated[Path, BeforeValidator(_path)]
Interval = Annotated[Duration, AfterValidator(_positive)]

# No dots in the names of streams: they are parts of dotted keys, as in stage.mixture.python.weight.
StreamName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
StageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
