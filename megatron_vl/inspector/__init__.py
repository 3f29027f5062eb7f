"""The content of a prepared data set, for a person: its figures, and rows as they are trained on.

``opening`` finds the data set and its vocabulary, ``overview`` counts, ``summary`` prints to the terminal; ``text``,
``row_view`` and ``thumbnails`` convert stored rows for display, ``page`` lays them out.

A data set holds texts, keys and images from untrusted sources. So only one module converts bytes to text, and it makes
invisible characters visible. Images are decoded under limits and encoded anew. The template engine escapes every text.
The page's content policy forbids any script but ours and any fetch.
"""
