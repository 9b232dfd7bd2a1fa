"""A run on disk: its directory, its history and its exit status."""
