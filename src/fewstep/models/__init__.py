"""Denoisers: adapters for networks, guidance, exact models, and the small trained ones that ship with the package."""
