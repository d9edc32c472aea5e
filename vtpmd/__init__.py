"""vtpmd: a vTPM daemon for QEMU that moves with its guest."""

__version__ = "0.1.0"
