"""Scripts and results behind every published number."""
