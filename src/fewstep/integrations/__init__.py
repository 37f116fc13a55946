"""Other people's loops, driven by this library's samplers: one file per host, none imported before it is asked for."""
