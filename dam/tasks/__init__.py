"""Tasks: puzzles, rewards, metrics and base models."""
