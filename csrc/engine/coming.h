/* What has come from elsewhere, and is to be committed next: how that is done of it.
 *
 *     nothing ──coming_expect──► again, later, back or instead ──coming_end──► nothing
 *
 *     state    comes                                      written   its generation, if it is
 *     again    no later state of a vTPM that may be this  if other  the one that it had
 *     later    a later one of this vTPM; or of another,   always    the one that it had
 *              where it is not known whose the image is
 *     back     no later one of this vTPM: a snapshot      if other  of the next restore epoch
 *     instead  another vTPM's, in place of a known one    always    of the next restore epoch
 *
 * "If other": the bytes are not the image's. Who is given a state keeps its number only if that is
 * what is committed, byte by byte (durable.h).
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "checkpoint.h"

enum coming_state {
    COMING_NOTHING,
    COMING_AGAIN,
    COMING_LATER,
    COMING_BACK,
    COMING_INSTEAD,
    COMING_STATES,
};

struct coming {
    enum coming_state state;
    uint64_t generation;                       /* that it keeps; 0: it gets one */
    uint8_t before[CHECKPOINT_IDENTITY_BYTES]; /* the identity, should it not be committed */
};

/* Return true if a state of this lineage is a later one of the vTPM that is here. */
bool coming_is_later(const struct checkpoint_lineage *lineage,
                     const struct checkpoint_lineage *ours);

/* Return what a state of this lineage is where there is `ours`, of which it `is_known` whose it is.
 * What is no later one, in place of a known one, has not all that was written here: so it is a
 * snapshot, as a vTPM that moves comes back with a later one. */
enum coming_state coming_kind(const struct checkpoint_lineage *lineage,
                              const struct checkpoint_lineage *ours, bool is_known);

/* Return true if it is written even if it is what the image holds. */
bool coming_is_written(enum coming_state state);

/* Return true if it begins the next restore epoch, if it is another image. */
bool coming_begins_epoch(enum coming_state state);

/* Return the generation that it keeps, or 0. What is later is the state that it was elsewhere,
 * until something changes it. Should it have been in vain, as the guest runs on there, what comes
 * the next time is no earlier one. */
uint64_t coming_generation(enum coming_state state, const struct checkpoint_lineage *lineage);

/* A state of this lineage comes to where there is `ours`; in place of what was expected before, if
 * anything was. */
void coming_expect(struct coming *coming, const struct checkpoint_lineage *lineage,
                   const struct checkpoint_lineage *ours, bool is_known);

/* It is committed, or it is not expected any more. */
void coming_end(struct coming *coming);
