"""What is inside a vTPM's state: decoded byte by byte, and shown. Nothing here writes.

    words/       names of the specification and of libtpms, as tables
    tree         what was found: nodes, each of some bytes
    reader       the one place where bytes are taken, within limits
    primitives   the types that a single node stands for
    layouts      the sections of libtpms' states: their fields, as tables
    permanent, volatile, and what they have in common: the code that follows those tables
    tpm12/       the states of a TPM 1.2
    records/     what vtpmd writes beside a state, alone: journal, delta record, owner record, tail
    decoding     from a state's bytes to its tree
    source, containers, directories, qemu_stream, qcow2   from a path to states
    difference, history   what a state has that another has not, or the one before it
    overview, contents, certificates   what a person or a program wants to know of all that
    secrets      what is shown in a secret's place
    screen, tree_text, report_json, html/   the ways to show it
    verification   whether it is right

A vTPM's start imports none of it.
"""
