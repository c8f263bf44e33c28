"""EdiVal's metrics on held-out sessions."""
