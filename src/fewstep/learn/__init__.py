"""Learn from a trained model: samplers, schedules, statistics, students."""
