"""What edits read and write: their vectors, directions, tokens, and the subspaces that they lie near."""
