"""The sampling loop, the samplers it runs, and the noise it starts from."""
