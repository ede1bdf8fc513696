"""Commands of the built-in plugin."""
