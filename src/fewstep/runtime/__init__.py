"""Files, processes and resumable work: everything that is not mathematics."""
