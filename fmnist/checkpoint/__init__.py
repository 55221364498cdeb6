"""Checkpoints: written whole or not at all, verified before they are used, no pickle in them.

A checkpoint is a directory `step_<8 digits>` with safetensors, JSON, and `manifest.json`: the size and sha256 of every
other file, written last. It is built under another name, synced, and renamed. `best_<8 digits>` is the same with the
weights to use alone: nothing resumes from it.
"""
