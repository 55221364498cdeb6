"""Rank training images by how likely their labels are wrong: `fmnist audit`."""
