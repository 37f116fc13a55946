"""Learners without training: statistics, schedules and fitted samplers."""
