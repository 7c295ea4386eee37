"""megacpt: continue a model on new token streams, at any scale, without forgetting."""

__version__ = "0.1.0"
