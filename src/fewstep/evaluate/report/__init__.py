"""Show benchmarks as a page and as tables."""
