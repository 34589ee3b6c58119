"""Figures: one style, and panel functions that take axes and data and know nothing of files."""
