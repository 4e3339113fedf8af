"""Processes, compiler options, files, hardware figures and progress bars."""
