"""Synthetic data whose texts are true: rendered scenes, document pages and photographs, in published formats.

``config`` says what and how much, ``generate.generate`` writes it; the readers of ``data.sources`` read it
back. The parts: ``scene`` (what is in a picture), ``language`` (what can be truly said about it), ``render``
(its pixels), ``lexicon`` and ``page`` (documents whose lines keep their quadrilaterals through perspective),
``photos``, ``writers``.

Training and held-out data are disjoint by construction: a hash of a scene's content, not its place in a
random stream, decides on which side it falls, so no seed can put a held-out scene into the training data.
"""
