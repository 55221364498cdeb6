"""What recipes are chosen and measured with; nothing in it is needed to train."""
