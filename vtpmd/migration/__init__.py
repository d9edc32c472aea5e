"""Moving a vTPM beside QEMU's pre-copy: states, decisions, the sealed tail. No I/O, no clock."""
