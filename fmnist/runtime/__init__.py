"""One process among others on one machine; it knows no option of a run."""
