"""Layouts of averaged checkpoints, against files that the real libraries wrote in this run."""
