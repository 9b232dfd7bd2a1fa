"""What a run has left behind, shown to people: one page, and loss curves beside each other."""
