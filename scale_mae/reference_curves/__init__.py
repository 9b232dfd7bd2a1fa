"""Loss curves of runs that went well, as bands: docs/report.md tells their format and how they were made."""
