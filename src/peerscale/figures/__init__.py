"""Figures and tables of studies; panel functions take axes and data and do not read files."""
