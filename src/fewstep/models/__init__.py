"""Trained networks as models, whatever their origin, with guidance, artifacts and files."""
