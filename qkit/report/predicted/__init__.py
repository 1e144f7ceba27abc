"""The report of a prediction: its words, tables, drawings, and the three files."""
