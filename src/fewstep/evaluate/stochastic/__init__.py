"""A benchmark of samplers that add noise beside samplers that do not: by the distance of their samples to the data."""
