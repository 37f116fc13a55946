"""Data sets of images as tensors."""
