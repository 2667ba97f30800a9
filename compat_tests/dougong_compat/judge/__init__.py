"""The parent's half: what an answer is worth. Only this half knows the oracle."""
