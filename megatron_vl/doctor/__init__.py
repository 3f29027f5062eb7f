"""What a machine, or all machines of a run, offer to training: facts first, then what follows from them.

* ``facts.py`` has the records. ``machine.py``, ``packages.py`` and ``group.py`` fill them, and judge nothing.
* ``judge_*.py`` are functions from facts to findings. They touch neither machine nor packages, so machines that are
  wrong in any way can be tested anywhere.
* ``findings.py`` joins the findings of all ranks, and writes them.

Nothing here may fail because of what it examines. Packages are imported in a process of their own (``probe.py``): a
broken one may end its process, or never come back.
"""
