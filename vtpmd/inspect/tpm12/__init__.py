"""libtpms' states of a TPM 1.2, taken apart.

    layouts      the structures of the specification, and libtpms' own: their fields, as tables
    structures   the code that follows those tables where a value decides what comes next
    keys         keys, with their private parts
    permanent, volatile   the three states
    overview     what a person or a program wants to know of them
    replacement  what a new TPM gets of another one's

There are no blocks here that could be skipped: behind a fault nothing more is decoded, but for what
has a length of its own.
"""
