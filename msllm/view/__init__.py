"""Tables and results as text, pages and plots."""
