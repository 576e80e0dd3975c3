"""A whole model at once: what is measured of every layer, and what it says in words."""
