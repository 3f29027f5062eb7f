"""Cleaning as in the paper's Appendix A: what a recipe's ``filters`` say, and what they do to a sample.

``options.py`` holds the thresholds, ``rules.py`` judges one sample by itself (in the workers), ``text.py`` knows
characters, tags and irregular patterns, ``duplicates.py`` compares images with one another (when parts are merged, so
that the order of the recipe decides and not the order in which workers finish).
"""
