"""Finding a model's files and reading weights from them."""
