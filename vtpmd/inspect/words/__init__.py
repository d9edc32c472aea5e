"""Names for numbers in a state: the specification's words, and libtpms' own. Tables alone."""
