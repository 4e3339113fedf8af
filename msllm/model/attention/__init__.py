"""Attention over the cells of tables: one visibility rule, several backends."""
