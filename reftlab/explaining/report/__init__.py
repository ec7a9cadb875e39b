"""An explanation as sentences, and as a page."""
