"""A network whose stages are sums of branches: its parts, its stages, the model, and how a block is read."""
