"""A page about a vTPM's state: one HTML file that needs nothing else, and runs nothing.

    elements     what a page is made of; the one place where text comes in, and is escaped
    document     the page around it all: its head, its policy, its parts
    style        how it looks
    state        the page of what is in a state
    glance, memory, pcrs, keys, tpm12, record, timeline   the parts of that
    difference   the page of what differs between two states

What is shown is what ``overview()`` and the history have told. Nothing is decided here but how.
"""
