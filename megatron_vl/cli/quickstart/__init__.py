"""The quickstart: raw data to a scored model, as a plan of public commands and a runner that can resume.

``plan`` defines the steps (every step is a command that a user could type). ``runner`` runs them and records which are
done. ``findings`` gathers the results of the steps, and ``profiles`` holds the sizes.
"""
