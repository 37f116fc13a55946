"""Neural operators: networks that map a start to the whole solution trajectory."""
