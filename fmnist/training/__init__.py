"""What surrounds the training loop: build, save, finish."""
