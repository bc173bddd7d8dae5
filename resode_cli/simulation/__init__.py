"""A training step without numbers: what it would hold and cost, known without running a kernel or owning the device."""
