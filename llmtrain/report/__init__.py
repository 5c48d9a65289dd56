"""What runs and sweeps came to: a ranked table and curves, from the files in their directories."""
