"""Model files of this project and of others, and how they become a `Model`."""
