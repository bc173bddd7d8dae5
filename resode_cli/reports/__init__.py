"""Results as tables, JSON and plots. Nothing here computes."""
