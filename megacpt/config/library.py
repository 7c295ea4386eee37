"""The configurations that come with megacpt: models, schedules, runs and stages under configs/."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import megacpt
from megacpt.errors import ConfigError, SetupError, nearest


@cache
def configs_folder() -> Path:
    """Return the folder configs/: beside the package in a source tree, inside it in a wheel.

    For a wheel, setup.py has to copy it there (and MANIFEST.in to `graft configs` for a source distribution):

        class BuildPackage(build_py):
            def run(self) -> None:
                super().run()
                if not self.editable_mode:
                    target = Path(self.build_lib) / "megacpt" / "configs"
                    shutil.copytree(ROOT / "configs", target, dirs_exist_ok=True)
    """
    package = Path(megacpt.__file__).parent
    for folder in (package / "configs", package.parent / "configs"):
        # site-packages may hold somebody else's folder of this name: look for one of our files.
        if (folder / "models" / "tiny.yaml").is_file():
            return folder
    raise SetupError(f"configs/ is neither in {package} nor beside it: install megacpt again")


def names(kind: str) -> list[str]:
    """Names of the configurations of one kind: ``models``, ``schedules``, ``runs`` or ``stages``."""
    return sorted(path.stem for path in (configs_folder() / kind).glob("*.yaml"))


def looks_like_path(text: str) -> bool:
    """Whether `text` is meant as the path of a YAML file rather than a name from configs/."""
    return "/" in text or "\\" in text or text.endswith((".yaml", ".yml"))


def model_path(name: str) -> Path:
    """Return the file of a model given by name or by path; raise ConfigError for unknown names."""
    return _path("model", name)


def schedule_path(name: str) -> Path:
    """Return the file of a schedule given by name or by path; raise ConfigError for unknown names."""
    return _path("schedule", name)


def _path(kind: str, name: str) -> Path:
    if looks_like_path(name):
        return Path(name).expanduser()
    known = names(f"{kind}s")
    if name not in known:
        raise ConfigError(f"there is no {kind} '{name}'{nearest(name, known)} (known: {', '.join(known)})")
    return configs_folder() / f"{kind}s" / f"{name}.yaml"
