"""The operating system and the terminal: files, locks, cores and memory, progress bars, the form of subcommands."""
