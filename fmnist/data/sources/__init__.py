"""Where data sets other than Fashion-MNIST come from: arrays, and folders of pictures."""
