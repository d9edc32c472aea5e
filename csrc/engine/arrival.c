#include "arrival.h"

#include <libtpms/tpm_error.h>
#include <string.h>

#include "epoch.h"
#include "error.h"
#include "version.h"

static void set(struct arrival *arrival, enum arrived what)
{
    arrival->what = what;
    arrival->has_given = false;
    arrival->has_lineage = arrival->is_another = false;
    arrival->newest = 0;
}

void arrival_forget(struct arrival *arrival, struct tpm *tpm, enum arrived next)
{
    if (arrival->has_given)
        tpm_forget_state(tpm);
    set(arrival, next);
}

void arrival_begin(struct arrival *arrival, struct tpm *tpm)
{
    arrival_forget(arrival, tpm, ARRIVED_NOTHING);
    arrival->has_started = false;
}

bool arrival_take_tail(struct arrival *arrival, struct tpm *tpm)
{
    if (arrival->what != ARRIVED_NOTHING || arrival->has_given) {
        arrival_forget(arrival, tpm, ARRIVED_UNUSABLE);
        error_report("the tail is refused: QEMU has brought a state before; migrate again");
        return false;
    }
    arrival->what = ARRIVED_TAIL;
    return true;
}

/* What swtpm has saved, or has served since, is taken as this vTPM's, and as older than all. */
static void take_nameless_snapshot(struct arrival *arrival, const struct checkpoint_lineage *own)
{
    arrival->has_lineage = true;
    arrival->lineage = *own;
    arrival->lineage.generation = 0;
    arrival->lineage.sleeps = false;
    arrival->newest = own->generation;
}

/* Compare whose permanent state has come with whose is here. Returns false if it is refused. */
static bool take_lineage(struct arrival *arrival, struct tpm *tpm,
                         const struct blob_content *content)
{
    struct checkpoint_lineage own;

    arrival->has_lineage = content->has_lineage;
    arrival->lineage = content->lineage;
    arrival->is_another = false;
    arrival->newest = 0;
    if (!tpm_get_lineage(tpm, &own))
        return true;
    if (!content->has_lineage) {
        if (arrival->has_started)
            take_nameless_snapshot(arrival, &own);
        return true;
    }
    arrival->is_another =
        memcmp(own.identity, content->lineage.identity, sizeof(own.identity)) != 0;
    if (arrival->is_another || content->lineage.generation <= own.generation)
        arrival->newest = own.generation;
    if (!arrival->is_another)
        return true;
    if (arrival->has_started) {
        error_report("the snapshot is of another vTPM, which takes the place of this one's");
        return true;
    }
    error_report("QEMU brings another vTPM than the state directory holds, which must not be lost; "
                 "the guest goes on at the source: give this one a directory of its own, and "
                 "migrate again");
    return false;
}

TPM_RESULT arrival_take_blob(struct arrival *arrival, struct tpm *tpm, uint32_t type,
                             const struct blob_content *content)
{
    bool is_permanent = type == LINK_STATE_PERMANENT;
    TPM_RESULT result = TPM_FAIL;

    if (!is_permanent)
        result = tpm_set_state(tpm, type, content->state, content->state_bytes);
    else if (take_lineage(arrival, tpm, content))
        result = tpm_set_come(tpm, arrival->has_lineage ? &arrival->lineage : NULL, content->state,
                              content->state_bytes);
    if (result != TPM_SUCCESS)
        return result;
    arrival->has_given = true;
    if (is_permanent)
        arrival->what = ARRIVED_BLOBS;
    return TPM_SUCCESS;
}

static TPM_RESULT start(struct arrival *arrival, struct tpm *tpm, struct store *store)
{
    bool has_come = arrival->what == ARRIVED_BLOBS;

    if (!has_come || !arrival->has_lineage)
        return tpm_init(tpm, has_come);
    tpm_raise_generation(tpm, store, LINK_STATE_PERMANENT, arrival->lineage.generation);
    return tpm_init_come(tpm, &arrival->lineage);
}

TPM_RESULT arrival_start(struct arrival *arrival, struct tpm *tpm, struct store *store)
{
    bool is_new = arrival->what != ARRIVED_BLOBS && !tpm_has_state(tpm);

    TPM_RESULT result = start(arrival, tpm, store);
    if (result == TPM_SUCCESS && is_new && tpm_has_state(tpm)) /* else it was told why not */
        error_report("a new TPM %s was made, as there was no state of one", version_now()->name);
    if (result != TPM_SUCCESS)
        error_report("the TPM does not start: libtpms refuses its state with %#x; the state files "
                     "are untouched: restore them from a copy",
                     result);
    return result;
}

/* Return the restore epoch that what has arrived has begun, or 0. */
static uint32_t begun_epoch(const struct arrival *arrival, struct tpm *tpm)
{
    struct checkpoint_lineage now;

    tpm_get_lineage(tpm, &now);
    uint64_t epoch = epoch_of(now.generation);
    bool is_later =
        epoch > epoch_of(arrival->newest) && epoch > epoch_of(arrival->lineage.generation);
    return is_later ? (uint32_t)epoch : 0; /* there are few */
}

/* Say what has been put back in time. Returns true if it is the vTPM's own state. */
static bool say_restored(const struct arrival *arrival, uint32_t epoch)
{
    unsigned long long generation = arrival->lineage.generation, newest = arrival->newest;

    if (arrival->is_another) {
        if (epoch > 0)
            error_report("restore epoch %u of the vTPM that has come begins", epoch);
        return false;
    }
    if (epoch > 0)
        error_report("an older state of the vTPM was restored: generation %llu, and there was "
                     "%llu; restore epoch %u begins",
                     generation, newest, epoch);
    else if (generation < newest)
        error_report("an older state of the vTPM was restored: generation %llu, and there was "
                     "%llu; no restore epoch begins: %s",
                     generation, newest,
                     epoch_begin(newest) > newest + 1 ? "nothing differs" : "none is left");
    return epoch > 0 || generation < newest;
}

bool arrival_end(struct arrival *arrival, struct tpm *tpm, TPM_RESULT result, bool is_incoming,
                 struct link_restored *restored, uint32_t *epoch)
{
    bool was_brought = arrival->what == ARRIVED_BLOBS;

    if (result != TPM_SUCCESS) {
        if (was_brought)
            arrival_forget(arrival, tpm, ARRIVED_UNUSABLE);
        return false;
    }
    arrival->has_started = true;
    if (!was_brought && !is_incoming)
        return false;
    *restored = (struct link_restored){arrival->lineage.generation, arrival->newest};
    *epoch = arrival->newest > 0 ? begun_epoch(arrival, tpm) : 0;
    bool is_older = say_restored(arrival, *epoch);
    set(arrival, ARRIVED_NOTHING);
    return is_older;
}
