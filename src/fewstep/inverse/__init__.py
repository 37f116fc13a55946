"""Inverse problems: samples of what was measured, with a diffusion model as the prior."""
