"""Every key of a run: its schema, how overrides become one configuration, and what must hold of it."""
