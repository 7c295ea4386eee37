"""Weights that come from other weights: averaging."""
