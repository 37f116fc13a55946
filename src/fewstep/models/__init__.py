"""Trained networks as denoisers, wherever they come from."""
