"""HTML reports of runs, and comparisons of loss curves."""
