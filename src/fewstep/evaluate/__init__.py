"""How good samples are: distances, benchmarks of samplers against each other, and pictures."""
