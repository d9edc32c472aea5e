/* The engine's end of the link to vtpmd: takes requests, calls the TPM, answers. */
#pragma once

#include "link_types.h"

struct data_channel;
struct store;
struct tpm;

/* What requests are about. */
struct link {
    int fd;
    struct tpm *tpm;
    struct store *store;
    struct data_channel *channel;
};

/* Carry out the requests of a boot record, and close it. Returns 0 if all of them succeeded, or a
 * negative errno. */
int link_boot(struct link *link, int fd);

/* Say that the engine can serve, then serve requests until vtpmd closes the link. Returns 0 then,
 * or a negative errno if the link broke or carried what cannot be a request. */
int link_serve(struct link *link, enum link_locked locked);
