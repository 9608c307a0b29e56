"""What happened, as typed records, and who listens."""
