"""A benchmark of inverse problems: the same pictures, measured alike, restored by each method."""
