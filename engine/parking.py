"""Parking: everything moved off the card while a run waits, and back again, exact to the bit."""
