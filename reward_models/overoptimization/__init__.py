"""The over-optimization lab: reward models that are optimized on purpose until the gold score falls."""
