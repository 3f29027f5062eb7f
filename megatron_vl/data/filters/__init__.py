"""Cleaning as in the paper's Appendix A: the ``filters`` of a recipe, and their effect on a sample.

``options.py`` holds the thresholds. ``rules.py`` checks single samples (in the workers). ``text.py`` handles
characters, tags and irregular patterns. ``duplicates.py`` compares images with each other. It runs when parts are
merged, so that the order of the recipe decides, not the order in which workers finish.
"""
