"""Data sets divided among clients, and batches of them."""
