"""What the machine gives and takes away: files that are written whole, locks, signals, memory."""
