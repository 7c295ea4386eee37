"""What a model knows of each stream, and what it forgot."""
