"""Searches for the numbers of a sampler: error bounds, least squares, descent."""
