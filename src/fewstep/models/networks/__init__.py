"""Network architectures that this library has to know."""
