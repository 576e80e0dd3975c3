"""Which way the gradient goes within a step."""
