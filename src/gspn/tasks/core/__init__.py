"""What training runs of every task share: configuration, loaders, optimiser, records, and the loop itself."""
