"""What happens where a loss or a gradient is no number: a step left out, or the last good state restored."""
