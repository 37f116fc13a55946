"""The verbs of the command line, one file for each: its options, what it does, and what it prints."""
