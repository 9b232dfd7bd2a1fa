"""What exists, what comes when, how it is decoded."""
