"""Find the catalogue items that look most like a picture: `python -m fmnist.apps.search`."""
