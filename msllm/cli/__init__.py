"""The command line: one file of flags per command."""
