"""Training with several processes, the ranks of a run, on torch.distributed."""
