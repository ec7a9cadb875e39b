"""What edits do together."""
