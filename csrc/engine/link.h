/* The engine's end of the link to vtpmd: takes requests, calls the TPM, answers. */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "link_types.h"

struct asker;
struct blackout;
struct io_posix;
struct linear;
struct server;
struct store;
struct tpm;

/* What requests are about. */
struct link {
    struct io_posix *files;
    struct linear *linear; /* or NULL: there is a directory */
    int wake_fd; /* wakes the server of the control channel up, to end after its command */
    struct tpm *tpm;
    struct store *store;
    struct server *server;
    struct asker *asker;
    struct blackout *blackout;
    struct link_serving serving; /* what the boot record says of that server */
    off_t boot_at;               /* where that goes on */
};

enum {
    LINK_NOT_ON = 3, /* the TPM does not start, of which it was told */
};

/* Carry out the requests of a boot record up to its first LINK_INIT, where the state is looked at
 * for the first time. Returns 0 or a negative errno. */
int link_boot_begin(struct link *link, int fd);

/* Carry out the rest, and close it. Returns 0 if all of them succeeded, LINK_NOT_ON, or a negative
 * errno. */
int link_boot(struct link *link, int fd);

enum {
    LINK_GONE = 1,   /* vtpmd has closed the connection, or is attached no more */
    LINK_ENDING = 2, /* it has said LINK_END */
};

/* Say on a new connection that the engine can serve, and give it what a vtpmd shares. Returns 0 or
 * a negative errno. */
int link_greet(int fd);

/* Take the next message, which has begun to come. Returns 0, one of the above, or a negative errno
 * if it is none, or does not come whole. */
int link_serve(struct link *link, int fd);

/* Make an eventfd readable, for good: it wakes who waits for that. */
void link_wake(int fd);
