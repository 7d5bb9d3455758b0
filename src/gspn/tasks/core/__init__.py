"""The parts that every task shares: the ``Task`` protocol, the training loop, configurations, loaders, checkpoints."""
