"""What a network is worth and what a command will take: accuracy, agreement, seconds, bytes."""
