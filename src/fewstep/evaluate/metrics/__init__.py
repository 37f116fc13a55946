"""Errors, distances between sets of images, and how certain they are."""
