"""Recipes: comparisons of papers at laptop size, with the sign that was found and how certain it is."""
