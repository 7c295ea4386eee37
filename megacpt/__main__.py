"""``python -m megacpt``, which is what torchrun starts."""

from megacpt.cli.main import main

main()
