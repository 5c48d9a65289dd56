"""Values that more than one part of the program has to agree on."""

IGNORE = -100  # a target that carries no loss; torch's default ``ignore_index``
