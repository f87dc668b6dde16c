"""What a downstream team does with a released backbone: load it, and measure it."""
