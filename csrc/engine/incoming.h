/* What a session brings to this host: the images of its rounds, and the TPM that is started from
 * them ahead of its guest, on standby. Who calls sees to it that one thread at a time does.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include <libtpms/tpm_library.h>

#include "link_types.h"
#include "staged.h"

struct tail;
struct tpm;

struct incoming {
    struct staged staged;
    bool is_held;                /* a TPM was started from just that, and nothing has come since */
    enum link_shutdown said;     /* of the guest whose TPM it is, or is to be */
    struct link_digests digests; /* of what it was started from, or is to be */
    uint32_t start_us;           /* how long that took */
};

/* Have the images be what a peer's records make of them, and libtpms, whose TPM is off, take them
 * for the next start; or start it from them at once, on standby, for a guest that has `said` so
 * last. Returns a TPM_RESULT. */
TPM_RESULT incoming_stage(struct incoming *incoming, struct tpm *tpm,
                          const struct staged_records *records, const enum link_shutdown *said);

/* Have the images be what a tail ends at. Returns a TPM_RESULT: an error if the TPM is in use, or
 * the tail continues neither what has come nor what was there before the last records, ends behind
 * what has come, or does not apply, and nothing has changed then. */
TPM_RESULT incoming_follow(struct incoming *incoming, struct tpm *tpm, const struct tail *tail);

/* Have the TPM be on standby from that, if it is not. Returns a TPM_RESULT: libtpms may refuse. */
TPM_RESULT incoming_start(struct incoming *incoming, struct tpm *tpm);

/* There are no more records to come: overwrite and free. */
void incoming_deinit(struct incoming *incoming);
