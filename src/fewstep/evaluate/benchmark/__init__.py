"""Compare samplers on one model."""
