"""Evaluate trained models: accuracy counted several ways, calibration, cost, pages and comparisons."""
