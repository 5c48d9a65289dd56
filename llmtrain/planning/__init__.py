"""What a run will take of memory, time, disk and money, found without training it."""
