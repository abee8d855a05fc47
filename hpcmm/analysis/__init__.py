"""Pure functions from events to tables: where the time of a step went, on which rank, and because of what."""
