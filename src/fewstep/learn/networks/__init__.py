"""Learners that train a network."""
