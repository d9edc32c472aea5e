/* The engine's end of the link to vtpmd: reads requests, calls the TPM, answers. */
#pragma once

#include "link_types.h"

struct data_channel;
struct store;
struct tpm;

/* Serve requests until vtpmd closes the link. Returns 0 then, or a negative errno if the link
 * broke or carried what cannot be a request. */
int link_serve(int fd, struct tpm *tpm, struct store *store, struct data_channel *channel,
               enum link_locked locked);
