"""What a trained encoder is worth, and what it sees."""
