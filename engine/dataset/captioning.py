"""Captioning pictures one by one into the overlay: resumable, and one failure never loses the others."""
