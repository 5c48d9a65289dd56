"""The order of training: permutation of sequences, packing of examples, and the validation split."""
