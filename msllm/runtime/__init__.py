"""What runs need of the machine: processes, compiler options, files, progress."""
