"""How an explanation is checked: replies, and runs in which it stands in for the edits."""
