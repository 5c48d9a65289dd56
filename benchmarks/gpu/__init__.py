"""The first half hour on a GPU, and counts of its work without one."""
