"""Loss curves of runs that went well, as bands: docs/guides/reports.md tells their format and how they were made."""
