"""Time and memory of methods against each other, each in a process of its own."""
