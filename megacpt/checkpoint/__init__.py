"""The store on disk: written atomically, verified, loaded into any layout, retained by rule."""

import megacpt.runtime  # noqa: F401  prepares megatron.core for import
