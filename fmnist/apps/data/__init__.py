"""Look at a data set before anything is trained on it: `python -m fmnist.apps.data`."""
