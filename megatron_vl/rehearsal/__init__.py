"""Rehearse a run of any number of ranks on a CPU: ``tools/train.py RECIPE --dry-run --world-size N --build``.

What could differ between the plan of a layout and its run is the run's own code. So the rehearsal runs that code, one
rank after another, each as if the others were there:

* ``rank.py`` makes the process groups of a rank, builds its chunks and its optimizer, and runs one training step of the
  trainer. Floating-point tensors have a shape and no contents (``hollow.py``), and the process groups write down what
  they are asked for (``recorder.py``). ``step.py`` says what the other ranks would have sent;
* ``groups.py`` compares what the members of each group believe;
* ``matching.py`` lays the programs of all ranks side by side: every send needs its receive, and none may wait for ever;
* ``planned.py`` compares parameters and messages with ``planning/``.

Ranks that run the same program are rehearsed once (``places.py``). Training knows nothing of this room.
"""
