"""The evidence: what a compression did, as JSON, as a page to read, and as tables in a terminal."""
