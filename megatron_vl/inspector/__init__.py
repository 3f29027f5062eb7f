"""What is in a prepared data set, for a person: figures of the whole, and rows as they are trained on.

``opening`` finds the data set and its vocabulary, ``overview`` counts, ``summary`` says it on the terminal;
``text``, ``row_view`` and ``thumbnails`` turn stored rows into something to look at, ``page`` lays it out.

A data set holds texts, keys and images from anywhere. So bytes become text in one place, which makes visible what
cannot be seen; images are decoded under limits and encoded anew; the template engine escapes every text; and the
page forbids itself, by its own content policy, any script but ours and any fetch.
"""
