"""The rehearsal: each stage of a run once, on its largest bucket, with what it really takes."""
