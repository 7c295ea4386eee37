"""How fast it is: measurements beside peers in one run, their results as JSON, and comparisons between results."""

import megacpt.runtime  # noqa: F401  prepares megatron.core for import
