"""The sample data; a package so that they are installed with the program."""
