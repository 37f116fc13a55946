"""Measurements of a trained model: trajectories, moments and derivatives."""
