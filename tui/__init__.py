"""The wizard and the monitor: what a terminal shows of a run, and the keys that command it."""
