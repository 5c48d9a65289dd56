"""The command line: arguments, help, completion and error messages."""
