"""Image sets: what exists, how it is read, what is wrong with it, and how it is split."""
