"""Race the data path against what people would use instead: python -m fmnist.benchmark --help."""
