"""Every option of a run, and nothing else: types, limits, YAML, flags, what makes two runs the same."""
