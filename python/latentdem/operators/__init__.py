"""Forward models: what turned the sharp image into the observation."""
