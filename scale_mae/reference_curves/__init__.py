"""Reference curves: bands in which the loss of a correct run lies. docs/guides/reports.md describes the format."""
