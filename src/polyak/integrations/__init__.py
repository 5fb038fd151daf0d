"""Averages inside other training frameworks, one file each, the framework imported at its top."""
