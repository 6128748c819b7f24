"""Saved models: what their config.json may say, how they are written, loaded and shared."""
