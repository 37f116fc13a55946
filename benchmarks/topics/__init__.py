"""What the tables of the README and the docs print, by topic."""
