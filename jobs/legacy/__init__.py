"""Code that was there before Exarq, and knows nothing of it."""
