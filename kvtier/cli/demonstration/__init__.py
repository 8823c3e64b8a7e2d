"""The demonstration: a model answers questions about one document, with kvtier and without."""
