"""Split learning: a model whose middle is trained at a server, its ends at the clients."""
