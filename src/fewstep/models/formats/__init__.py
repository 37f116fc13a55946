"""Model files of this project and of others: what they hold, and how they become a `Model`."""
