"""Ollama's API, so that programs made for it work."""
