/* vtpmd comes and goes: one at a time is attached to the engine, and none need be.
 *
 *     serving ── LINK_END, or its end while no vtpmd is attached ──► ended
 *        │ a signal, or QEMU's SHUTDOWN, while one is
 *        ▼
 *     ending ── LINK_END, vtpmd is gone, or LINK_END_TIMEOUT_MS have passed ──► ended
 *
 * That a vtpmd goes, by whatever way, ends nothing: its engine serves on as one that is alone. Who
 * connects while another is attached waits in the socket's backlog.
 */
#pragma once

struct link;

/* What the thread of the link waits for; the caller's. */
struct attach {
    struct link *link;
    int listening_fd;
    int signal_fd; /* readable once a signal is to end the vTPM */
    int served_fd; /* readable once the control channel is served no more */
};

/* Serve one vtpmd after another until the vTPM is to end. */
void attach_run(struct attach *attach);
