"""Compare incoming pictures with the training data: `python -m fmnist.apps.monitor`."""
