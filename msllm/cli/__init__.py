"""The command line. Each command is a module with its flags and its help text."""
