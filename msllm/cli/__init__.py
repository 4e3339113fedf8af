"""The command line: one module for each command, with its flags and its help text."""
