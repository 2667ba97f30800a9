"""The parts that models are made of. Each knows its share of the ranks and how to load itself."""
