"""Predict pictures from outside: `python -m fmnist.apps.predict`."""
