"""The tiering manager and the decisions it is made of."""
