"""Commands to a run of another process: a private socket, one JSON line each way."""
