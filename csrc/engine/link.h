/* The engine's end of the link to vtpmd: takes requests, calls the TPM, answers. */
#pragma once

#include "link_types.h"

struct asker;
struct blackout;
struct server;
struct store;
struct tpm;

/* What requests are about. */
struct link {
    int fd;
    int wake_fd; /* wakes the server of the control channel up, to end */
    struct tpm *tpm;
    struct store *store;
    struct server *server;
    struct asker *asker;
    struct blackout *blackout;
    struct link_digests held;    /* what the TPM on standby was started from */
    struct link_serving serving; /* what the boot record says of that server */
};

/* Carry out the requests of a boot record, and close it. Returns 0 if all of them succeeded, or a
 * negative errno. */
int link_boot(struct link *link, int fd);

/* Say that the engine can serve, then serve requests until vtpmd closes the link. Returns 0 then,
 * or a negative errno if the link broke or carried what cannot be a request. */
int link_serve(struct link *link);

/* Have the control channel served no longer than until the command that is carried out. */
void link_end_control(struct link *link);
