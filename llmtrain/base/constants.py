"""Values that several parts of the program share."""

IGNORE = -100  # a target that carries no loss; torch's default ``ignore_index``
