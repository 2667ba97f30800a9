"""The worker's half of every kind of case: set up, call the backend, hand back what it did."""
