"""Fine-tuning on labels: settings, optimizers, the loop, its guards, and the folder of a run."""
