"""Samplers of this library in other programs: one file per program, each imported on first use."""
