"""Which sequences are visited when: permutation, packing, and the validation split."""
