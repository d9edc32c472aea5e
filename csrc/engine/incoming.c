#include "incoming.h"

#include <errno.h>
#include <libtpms/tpm_error.h>
#include <string.h>

#include "clock.h"
#include "nvram.h"
#include "saved.h"
#include "tail.h"
#include "tpm.h"
#include "version.h"

static TPM_RESULT set_both_states(struct tpm *tpm, const struct nvram_states *states)
{
    TPM_RESULT result =
        tpm_set_state(tpm, LINK_STATE_PERMANENT, states->permanent, states->permanent_bytes);

    if (result == TPM_SUCCESS)
        result =
            tpm_set_state(tpm, LINK_STATE_VOLATILE, states->volatile_state, states->volatile_bytes);
    if (result == TPM_SUCCESS && states->saved_bytes > 0)
        result = tpm_set_state(tpm, LINK_STATE_SAVESTATE, states->saved, states->saved_bytes);
    return result;
}

/* Returns false if a TPM 1.2's image is none of two states. */
static bool part_saved(struct nvram_states *states)
{
    if (!saved_measure(states->volatile_state, states->volatile_bytes, &states->volatile_bytes,
                       &states->saved_bytes))
        return false;
    states->saved = states->volatile_state + states->volatile_bytes;
    return true;
}

static void note(struct incoming *incoming, const struct nvram_states *states,
                 enum link_shutdown said)
{
    memcpy(incoming->digests.permanent_digest, states->permanent_digest, DIGEST_BYTES);
    memcpy(incoming->digests.volatile_digest, states->volatile_digest, DIGEST_BYTES);
    incoming->said = said;
}

static TPM_RESULT stand_by(struct incoming *incoming, struct tpm *tpm,
                           const struct nvram_states *states, enum link_shutdown said)
{
    int64_t began_ns = clock_ns();

    TPM_RESULT result = tpm_init_standby(tpm, said, states);
    if (result != TPM_SUCCESS)
        return result;
    note(incoming, states, said);
    incoming->start_us = (uint32_t)((clock_ns() - began_ns) / NS_PER_US);
    incoming->is_held = true;
    return TPM_SUCCESS;
}

/* Returns false if there are no two states, or a TPM 1.2's is none. */
static bool get_states(const struct incoming *incoming, struct nvram_states *states)
{
    return staged_get(&incoming->staged, states) == 0 &&
           (version_now()->has_shutdown || part_saved(states));
}

static TPM_RESULT start(struct incoming *incoming, struct tpm *tpm, const enum link_shutdown *said)
{
    struct nvram_states states;

    incoming->is_held = false;
    if (!get_states(incoming, &states))
        return TPM_BAD_PARAMETER;
    return said ? stand_by(incoming, tpm, &states, *said) : set_both_states(tpm, &states);
}

static TPM_RESULT result_of(int r)
{
    return r == -ENOMEM ? TPM_SIZE : TPM_BAD_PARAMETER;
}

TPM_RESULT incoming_stage(struct incoming *incoming, struct tpm *tpm,
                          const struct staged_records *records, const enum link_shutdown *said)
{
    int r = staged_take(&incoming->staged, records);

    return r < 0 ? result_of(r) : start(incoming, tpm, said);
}

/* Return true if the TPM is on: on standby, or in use. */
static bool is_on(struct tpm *tpm, bool on_standby)
{
    enum tpm_custody custody;
    enum tpm_power power;

    tpm_look(tpm, &power, &custody);
    return power == TPM_ON && (custody == TPM_STANDBY) == on_standby;
}

/* Return true if a tail continues what was there before the last round, and has what that had. */
static bool overtakes_round(const struct staged *staged, const struct tail *tail)
{
    return staged_was(staged, tail->permanent_from, tail->volatile_from) &&
           tail->permanent_to >= staged->permanent.generation &&
           tail->volatile_to >= staged->following.generation;
}

/* Have the images be what a tail makes of them, or of those before the last round. As
 * staged_take(); -EBADMSG if it continues neither, too. */
static int take_records(struct staged *staged, const struct tail *tail)
{
    if (staged_is(staged, tail->permanent_from, tail->volatile_from))
        return staged_take(staged, &tail->records);
    if (!overtakes_round(staged, tail))
        return -EBADMSG;
    staged_go_back(staged);
    int r = staged_take(staged, &tail->records);
    if (r < 0)
        staged_go_back(staged); /* to what is there */
    return r;
}

TPM_RESULT incoming_follow(struct incoming *incoming, struct tpm *tpm, const struct tail *tail)
{
    enum link_shutdown said = tail->power;
    bool is_there = staged_is(&incoming->staged, tail->permanent_to, tail->volatile_to);

    if (is_there && incoming->is_held && incoming->said == said && is_on(tpm, true))
        return TPM_SUCCESS;
    if (is_on(tpm, false) || !tail_is_consistent(tail))
        return TPM_BAD_ORDINAL;
    struct nvram_states states;
    int r = is_there ? 0 : take_records(&incoming->staged, tail);
    if (r < 0)
        return result_of(r);
    incoming->is_held = false;
    if (!get_states(incoming, &states))
        return TPM_BAD_PARAMETER;
    note(incoming, &states, said);
    return TPM_SUCCESS;
}

TPM_RESULT incoming_start(struct incoming *incoming, struct tpm *tpm)
{
    enum link_shutdown said = incoming->said;

    return incoming->is_held ? TPM_SUCCESS : start(incoming, tpm, &said);
}

void incoming_deinit(struct incoming *incoming)
{
    staged_deinit(&incoming->staged);
    *incoming = (struct incoming){0};
}
