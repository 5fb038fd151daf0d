"""polyak inside other frameworks: one file each, which imports its framework."""
