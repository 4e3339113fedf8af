"""Tables, prepared data and results as text, pages and plots."""
