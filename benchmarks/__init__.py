"""Cost of averages beside the libraries that also make them: ``make bench`` or see README.md."""
