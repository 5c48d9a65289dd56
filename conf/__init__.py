"""The config groups; a package so that they are installed with the program."""
