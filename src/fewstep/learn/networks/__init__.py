"""Train networks: students of a model, models tuned for few steps, and models of images."""
