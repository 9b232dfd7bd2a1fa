"""Measures training and delivers the results: log files, console, Prometheus, and experiment trackers."""
