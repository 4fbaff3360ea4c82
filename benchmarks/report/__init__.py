"""Figures and the forms that they are shown in: tables, plots, an HTML page, terminal output."""
