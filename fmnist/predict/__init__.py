"""Predict pictures from outside: `python -m fmnist.predict`."""
