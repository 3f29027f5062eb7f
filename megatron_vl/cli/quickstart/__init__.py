"""Run the steps that ``examples/quickstart.sh`` lists: skip what is done, record the time, and report.

``steps`` reads the list. ``runner`` runs it, and ``ledger`` records which steps are done. ``findings`` gathers the
results for the report.
"""
