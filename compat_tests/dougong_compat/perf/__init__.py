"""L5: performance as a share of the device's own measured ceilings. Reported, never judged."""
