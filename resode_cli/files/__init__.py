"""Model files, and formats that other programs read."""
