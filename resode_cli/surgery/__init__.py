"""Changes to a network: convert, tie, untie, deepen, and BatchNorm statistics measured anew."""
