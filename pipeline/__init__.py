"""The work: what must be done with the audio? Plain Python, no Ray."""
