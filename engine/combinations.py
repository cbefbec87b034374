"""Which settings cannot hold together: a table, each row one sentence and one fix."""
