"""The quickstart: raw data to a scored model, as a plan of public commands and a runner that can go on.

``plan`` says what to do (every step is a command that a user could type), ``runner`` does it and remembers what
is done, ``findings`` gathers what the steps found out, ``profiles`` says how much.
"""
