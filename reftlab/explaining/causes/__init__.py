"""What edits cause: parts taken away, scaled, put back, and the ways that their effect takes."""
