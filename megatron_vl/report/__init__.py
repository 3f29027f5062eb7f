"""The report of a run: its records, requirements, tables, plots and page."""
