"""Studies, and models of others that are accelerated."""
