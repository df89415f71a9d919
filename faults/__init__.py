"""What can happen to a run, done to it: `python -m faults`. docs/reliability.md holds the table that it prints."""
