"""What a fit reads, and `fit` itself."""
