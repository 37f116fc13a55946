"""Compare samplers honestly, and show the result."""
