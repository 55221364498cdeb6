"""Train image classifiers on data that fits on the GPU: fast, exact, readable."""
