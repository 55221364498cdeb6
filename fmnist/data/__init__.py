"""The data path: find, fetch and parse Fashion-MNIST; keep a split on the device; augment it there."""
