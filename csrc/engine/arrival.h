/* What the QEMU that uses the TPM has brought for its next INIT: invariant 13 in the engine.
 *
 *     nothing    the TPM starts from what the directory holds
 *     blobs      from the permanent state that QEMU has set, whoever's the vTPM was
 *     tail       from what a peer's session and the tail made, or not at all
 *     unusable   what it has brought was refused: it does not start for a guest that came so
 *
 *     nothing ──a tail──────────────────────► tail  ──INIT──► nothing
 *     any but tail ──a permanent blob───────► blobs ──INIT──► nothing
 *     any but tail ──a blob that is refused─► unusable
 *     any ──a tail, after a blob or a tail──► unusable
 *     blobs ──INIT fails────────────────────► unusable
 *     any ──STOP, SET_DATAFD────────────────► nothing
 *
 * In tail, blobs are refused, and nothing changes. In tail and unusable, only the INIT of a guest
 * that came with no stream starts the TPM, from what the directory holds, and changes nothing.
 *
 * Its one writer is the control server; on its behalf, while it waits for vtpmd's word, the link.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "blob.h"
#include "tpm.h"

enum arrived {
    ARRIVED_NOTHING,
    ARRIVED_BLOBS,
    ARRIVED_TAIL,
    ARRIVED_UNUSABLE,
};

struct arrival {
    _Atomic enum arrived what; /* others look at it */
    _Atomic bool has_given;    /* libtpms has states from QEMU for the next INIT; the same */
    bool has_lineage;          /* of the blobs: which vTPM's they are */
    struct checkpoint_lineage lineage;
    bool is_another; /* than the vTPM that is here */
    uint64_t newest; /* the generation that is here, if what has arrived is no later one; or 0 */
    _Atomic bool has_started; /* the TPM, for the QEMU that uses it; others look at it */
};

/* Another QEMU uses the TPM. What the last one brought is not its guest's. */
void arrival_begin(struct arrival *arrival, struct tpm *tpm);

/* Drop what has arrived. What arrives `next` is usable, or is not. */
void arrival_forget(struct arrival *arrival, struct tpm *tpm, enum arrived next);

/* A tail arrives. Returns false if it must not be used. */
bool arrival_take_tail(struct arrival *arrival, struct tpm *tpm);

/* Take a state of a stopped TPM. What comes with a migration takes no other vTPM's place; a
 * snapshot is on the VM's own disk, whose word is taken. Returns a TPM_RESULT. After an error, as
 * after a blob that was refused before it came here, all that has arrived is unusable: libtpms
 * drops it, and who calls has it forgotten. */
TPM_RESULT arrival_take_blob(struct arrival *arrival, struct tpm *tpm, uint32_t type,
                             const struct blob_content *content);

/* Start the TPM from what has arrived, or from the directory. Returns a TPM_RESULT. */
TPM_RESULT arrival_start(struct arrival *arrival, struct tpm *tpm, struct store *store);

/* An INIT was carried out, by arrival_start() or by a session, for a guest that came with a stream
 * or did not. Returns true if what runs now is an older state than there was, which is said:
 * `restored` has the two generations, `epoch` the restore epoch that began, or 0. */
bool arrival_end(struct arrival *arrival, struct tpm *tpm, TPM_RESULT result, bool is_incoming,
                 struct link_restored *restored, uint32_t *epoch);
