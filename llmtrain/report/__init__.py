"""Reports of runs and sweeps: a ranked table and curves, from the files in their directories."""
