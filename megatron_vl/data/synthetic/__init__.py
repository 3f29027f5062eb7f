"""Synthetic data with true texts: rendered scenes, document pages and photographs, in published formats.

``config`` defines what to generate and how much, and ``generate.generate`` writes it. The readers of ``data.sources``
read it back. The other modules: ``scene`` (the content of a picture), ``language`` (true statements about it),
``render`` (its pixels), ``lexicon`` and ``page`` (documents whose lines keep their quadrilaterals through perspective),
``photos``, ``writers``.

Training and held-out data are disjoint by construction. The hash of a scene's content decides its split, not its
position in a random stream. So no seed can put a held-out scene into the training data.
"""
