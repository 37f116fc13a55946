"""Samplers against each other on one model."""
