"""One page that shows benchmarks."""
