"""Make statistics, schedules and samplers of a model, without training."""
