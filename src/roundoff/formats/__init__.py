"""Number formats: which grid an element has, how many elements share a scale, and by which rule the scale is chosen.

Only descriptions live here, without torch, so that settings can be checked at once. How a tensor is stored in a format
and read back is the business of `roundoff.numerics`.

Doors: `table.FORMATS` and `table.get_format`, `table.Format`, the elements in `element`, `spelling`, which reads and
writes a format of one's own, and `words`, which describes one to people.
"""
