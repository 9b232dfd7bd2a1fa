"""A run on disk: its directory, index, ID, history of events, and exit status."""
