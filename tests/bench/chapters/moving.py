"""Chapter: a vTPM that moves: bytes and time at stop-and-copy, and what its guest notices.

Bytes and time at the sockets come from the same hand-overs, each between two new processes. The
vTPM's share of the downtime is what QEMU waits for at both control sockets while the guest stands
still; the command that the guest's TPM still runs comes before that and is shown apart. Where the
bench is QEMU, vtpmd is told by its monitor that the guest stops, as early before QEMU's question as
QEMU does when there is no memory left to send. With QEMU,
the same guest migrates without a TPM, with swtpm and with vtpmd, and what QEMU itself waited for is
taken from its calls of sendmsg() and recvmsg() (tests/bench/waits.c).

The floor of both is what two C processes need that exchange the same messages, of the same sizes,
on the same kinds of sockets, and have no TPM (tests/bench/floor.c).
"""

from tests.bench.report import Result, Settings

NAME = "moving"
SUMMARY = "bytes and time at stop-and-copy, whole migrations of a guest, throughput while armed"


def run(settings: Settings) -> Result:
    """Measure the chapter."""
    from tests.bench.moving import result  # not needed for --help, which runs before the set-up

    return result.measure(settings)
