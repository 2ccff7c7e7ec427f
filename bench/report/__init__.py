"""From records to pages, charts and the numbers of README.md."""
