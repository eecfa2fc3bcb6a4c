"""Python value to payload and back: one codec for each kind of column."""
