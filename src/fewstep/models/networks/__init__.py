"""Network architectures, and how networks are called."""
