"""A rewritten network brought back to the one that it came from, on images without labels."""
