"""Search by vectors of images: nearest neighbours, their metrics, and an index on disk."""
