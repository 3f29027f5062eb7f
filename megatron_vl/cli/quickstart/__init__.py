"""Run the steps that ``examples/quickstart.sh`` lists: skip what is done, record the time, and report.

``steps`` reads the list. ``runner`` runs it, and ``ledger`` records which steps are done. ``run_info`` records
the run for the report.
"""
