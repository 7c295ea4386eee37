"""Weights that come from other weights: averages, packed ones, and the files of other programs."""
