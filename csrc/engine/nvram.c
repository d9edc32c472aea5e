#include "nvram.h"

#include <errno.h>
#include <libtpms/tpm_error.h>
#include <libtpms/tpm_library.h>
#include <libtpms/tpm_nvfilename.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "durable.h"
#include "error.h"
#include "image.h"
#include "kept_file.h"
#include "long_command.h"
#include "orderly.h"
#include "sharing.h"
#include "tpm.h"
#include "version.h"
#include "written.h"

static struct io *store_io;
static struct durable *permanent;
static struct cipher_key file_key; /* of no bytes: state files are in the clear */
/* But for the permanent state's, of which only the name is used: `permanent` has it. */
static struct kept_file state_files[] = {
    [LINK_STATE_PERMANENT] = {.name = TPM_PERMANENT_ALL_NAME},
    [LINK_STATE_VOLATILE] = {.name = TPM_VOLATILESTATE_NAME},
    [LINK_STATE_SAVESTATE] = {.name = TPM_SAVESTATE_NAME},
};

#define NO_TYPE ((enum link_state_type)0)

/* Of a TPM that is not this host's yet: its permanent state, whose file must not be written. */
static struct image held;
static bool held_has_changed;
static uint8_t given_digest[DIGEST_BYTES]; /* of what it was before it changed, for an anchor */
/* What libtpms is to start from, while it does. */
static const struct nvram_states *given;

/* Three that are independent of one another: libtpms', custody's as tpm.c has told it, and who else
 * may write to the files. */
static bool has_failed;   /* to store the permanent state, since libtpms was started */
static bool is_read_only; /* the vTPM is, or may be, another host's: its files stay as they are */
static enum sharing sharing;

static enum link_state_type type_by_name(const char *name)
{
    for (enum link_state_type i = LINK_STATE_PERMANENT; i <= LINK_STATE_SAVESTATE; i++)
        if (strcmp(state_files[i].name, name) == 0)
            return i;
    return NO_TYPE;
}

int nvram_load(enum link_state_type type, const uint8_t *state, size_t state_bytes)
{
    if (type == LINK_STATE_PERMANENT)
        return durable_load(permanent, state, state_bytes, true);
    return kept_load(&state_files[type], state, state_bytes);
}

int nvram_set_journal(const struct journal_settings *settings, struct store *store, uint64_t loaded,
                      bool is_known)
{
    int r = durable_set_journal(permanent, settings, store, true);
    if (r >= 0)
        durable_set_loaded(permanent, loaded, is_known);
    return r;
}

void nvram_forgo_journals(void)
{
    durable_forgo_journals(permanent);
}

int nvram_set_key(const struct cipher_key *key)
{
    int r = durable_set_key(permanent, key);
    if (r >= 0)
        file_key = *key;
    return r;
}

int nvram_set_anchor(const struct anchor *anchor)
{
    return durable_set_anchor(permanent, anchor);
}

int nvram_store_permanent(pthread_mutex_t *lock)
{
    return is_read_only ? -EROFS : durable_store(permanent, lock);
}

void nvram_set_read_only(bool is_so)
{
    if (is_so && !is_read_only)
        durable_leave(permanent);
    is_read_only = is_so;
}

void nvram_defer(bool is_so)
{
    durable_defer(permanent, is_so);
}

void nvram_set_on(bool is_so)
{
    if (is_so && !is_read_only)
        durable_begin(permanent);
    else
        durable_pause(permanent);
}

/* The one writer of who shares the files. */
static void note_sharing(enum sharing_event event)
{
    sharing = sharing_after(event, sharing);
}

static bool is_unlocked(void)
{
    return sharing == SHARING_LET_GO || sharing == SHARING_BESET;
}

void nvram_beware(void)
{
    note_sharing(SHARING_WARNED);
    if (sharing == SHARING_BESET)
        durable_forgo_journals(permanent);
}

static void look_again_if_wary(void)
{
    if (sharing == SHARING_BESET || sharing == SHARING_DOUBTED)
        store_io->look_again(store_io);
}

static int end_permanent(void)
{
    int r = durable_end(permanent);

    if (r < 0 || sharing != SHARING_DOUBTED)
        return r;
    store_io->look_again(store_io);
    return durable_reclaim(permanent);
}

int nvram_unlock(void)
{
    int r = is_unlocked() ? 0 : end_permanent();

    if (r >= 0 && !is_unlocked())
        r = store_io->lock(store_io, false);
    if (r >= 0)
        note_sharing(SHARING_UNLOCKED);
    return r;
}

void nvram_start_unlocked(void)
{
    note_sharing(SHARING_UNLOCKED);
}

/* What another has left: a volatile state is removed before a command is answered; a saved one has
 * its meaning then. */
static int reclaim_file(enum link_state_type type)
{
    struct kept_file *file = &state_files[type];

    int r = kept_reclaim(file, store_io, nvram_key());
    bool is_anothers = r >= 0 && file->state == KEPT_UNSURE;
    return is_anothers && type != LINK_STATE_VOLATILE ? kept_remove(file, store_io) : r;
}

int nvram_lock(void)
{
    int r = store_io->lock(store_io, true);
    if (r < 0 || !is_unlocked())
        return r;
    store_io->look_again(store_io);
    r = durable_reclaim(permanent);
    if (r >= 0)
        r = reclaim_file(LINK_STATE_VOLATILE);
    if (r >= 0 && !version_now()->has_shutdown)
        r = reclaim_file(LINK_STATE_SAVESTATE);
    if (r < 0)
        store_io->lock(store_io, false);
    else
        note_sharing(SHARING_LOCKED);
    return r;
}

bool nvram_has_journal(void)
{
    return durable_has_journal(permanent);
}

bool nvram_is_in_room(void)
{
    return durable_is_in_room(permanent);
}

int nvram_end(void)
{
    return is_read_only ? 0 : end_permanent();
}

bool nvram_is_removed(void)
{
    return !is_read_only && durable_is_removed(permanent);
}

bool nvram_get(enum link_state_type type, const uint8_t **bytes, size_t *n_bytes)
{
    if (type == LINK_STATE_PERMANENT)
        return durable_get(permanent, bytes, n_bytes);
    *bytes = state_files[type].image.bytes;
    *n_bytes = state_files[type].image.n_bytes;
    return state_files[type].image.exists;
}

enum link_shutdown nvram_last_shutdown(void)
{
    const uint8_t *bytes;
    size_t n_bytes;

    if (!version_now()->has_shutdown)
        return nvram_may_have(LINK_STATE_SAVESTATE) ? LINK_SHUTDOWN_STATE : LINK_SHUTDOWN_NONE;
    return durable_get(permanent, &bytes, &n_bytes) ? orderly_shutdown(bytes, n_bytes)
                                                    : LINK_SHUTDOWN_NONE;
}

bool nvram_may_have(enum link_state_type type)
{
    const uint8_t *bytes;
    size_t n_bytes;

    return nvram_get(type, &bytes, &n_bytes) || state_files[type].state == KEPT_UNSURE;
}

int nvram_store(enum link_state_type type, const uint8_t *state, size_t state_bytes)
{
    if (is_read_only)
        return -EROFS;
    look_again_if_wary();
    if (type == LINK_STATE_PERMANENT)
        return durable_commit(permanent, state, state_bytes);
    return kept_store(&state_files[type], store_io, nvram_key(), state, state_bytes);
}

int nvram_remove(enum link_state_type type)
{
    check(type != LINK_STATE_PERMANENT); /* it is replaced, never removed */
    if (is_read_only)
        return -EROFS;
    look_again_if_wary();
    return kept_remove(&state_files[type], store_io);
}

void nvram_deinit(void)
{
    nvram_let_go();
    durable_free(permanent);
    for (size_t i = LINK_STATE_PERMANENT; i <= LINK_STATE_SAVESTATE; i++)
        kept_deinit(&state_files[i]);
    explicit_bzero(&file_key, sizeof(file_key));
}

void nvram_give(const struct nvram_states *states)
{
    given = states;
}

int nvram_hold(const uint8_t *state, size_t state_bytes)
{
    held_has_changed = false;
    if (durable_has_anchor(permanent)) {
        int r = digest_compute(state, state_bytes, given_digest);
        if (r < 0)
            return r;
    }
    return image_set(&held, state, state_bytes);
}

int nvram_expect(const struct checkpoint_lineage *lineage)
{
    return durable_expect(permanent, lineage);
}

void nvram_prepare(const uint8_t *state, size_t state_bytes,
                   const struct checkpoint_lineage *lineage)
{
    durable_bring(permanent, state, state_bytes);
    if (is_read_only)
        return;
    store_io->look_again(store_io);
    durable_prepare(permanent, state, state_bytes, lineage);
}

void nvram_await(void)
{
    /* A TPM 1.2's saved state is in a file of its own, and belongs to it. */
    if (!is_read_only && !is_unlocked() && version_now()->has_shutdown)
        durable_await(permanent);
}

void nvram_unawait(void)
{
    durable_unawait(permanent);
}

void nvram_unprepare(void)
{
    durable_unprepare(permanent);
}

bool nvram_has_come(void)
{
    return durable_has_come(permanent);
}

bool nvram_has_failed(void)
{
    return has_failed;
}

bool nvram_get_lineage(struct checkpoint_lineage *lineage)
{
    *lineage = durable_lineage(permanent);
    return durable_is_known(permanent);
}

const struct cipher_key *nvram_key(void)
{
    return file_key.n_bytes ? &file_key : NULL;
}

int nvram_adopt(const struct checkpoint_lineage *lineage, bool is_to_be_written,
                const struct image *saved)
{
    struct kept_file *saved_file = &state_files[LINK_STATE_SAVESTATE];
    int r = kept_remove(&state_files[LINK_STATE_VOLATILE], store_io);

    if (r >= 0)
        r = saved->exists
                ? kept_store(saved_file, store_io, nvram_key(), saved->bytes, saved->n_bytes)
                : kept_remove(saved_file, store_io);
    if (r >= 0)
        r = durable_adopt(permanent, held.bytes, held.n_bytes, given_digest,
                          is_to_be_written || held_has_changed, lineage->identity);
    return r;
}

bool nvram_is_adopting(void)
{
    return durable_is_adopting(permanent);
}

void nvram_let_go(void)
{
    image_deinit(&held);
}

/* libtpms' callbacks. It has one TPM, number 0. */

static TPM_RESULT on_init(void)
{
    return TPM_SUCCESS;
}

static TPM_RESULT on_nvram_init(void)
{
    has_failed = false;
    return TPM_SUCCESS;
}

/* What files hold is not the held TPM's: that starts from what it was given alone. */
static bool find_to_load(enum link_state_type type, const uint8_t **bytes, size_t *n_bytes)
{
    if (given && type == LINK_STATE_PERMANENT) {
        *bytes = given->permanent;
        *n_bytes = given->permanent_bytes;
        return true;
    }
    if (given && type == LINK_STATE_VOLATILE) {
        *bytes = given->volatile_state;
        *n_bytes = given->volatile_bytes;
        return given->volatile_bytes > 0;
    }
    return (!held.exists || type == LINK_STATE_PERMANENT) && nvram_get(type, bytes, n_bytes);
}

static TPM_RESULT on_load(unsigned char **data, uint32_t *length, uint32_t tpm_number,
                          const char *name)
{
    enum link_state_type type = type_by_name(name);
    const uint8_t *bytes;
    uint8_t *copy;
    size_t n_bytes;

    (void)tpm_number;
    if (type == NO_TYPE || !find_to_load(type, &bytes, &n_bytes))
        return TPM_RETRY; /* "there is no such file" */
    copy = malloc(n_bytes ? n_bytes : 1);
    if (!copy)
        return TPM_SIZE;
    memcpy(copy, bytes, n_bytes);
    *data = copy;
    *length = (uint32_t)n_bytes;
    return TPM_SUCCESS;
}

static int hold_more(const uint8_t *state, size_t state_bytes)
{
    if (image_is(&held, state, state_bytes))
        return 0;
    held_has_changed = true;
    return image_set(&held, state, state_bytes);
}

static TPM_RESULT on_store(const unsigned char *data, uint32_t length, uint32_t tpm_number,
                           const char *name)
{
    enum link_state_type type = type_by_name(name);

    (void)tpm_number;
    if (type == NO_TYPE || !long_command_may_store())
        return TPM_FAIL;
    written_note(data, length); /* the buffer is libtpms' own, which frees it next */
    if (held.exists && type == LINK_STATE_PERMANENT)
        return hold_more(data, length) < 0 ? TPM_SIZE : TPM_SUCCESS;
    int r = nvram_store(type, data, length);
    if (r < 0) {
        /* libtpms stops the TPM on this: an unsaved change is never acknowledged. */
        const char *target = type == LINK_STATE_PERMANENT ? durable_target(permanent) : name;
        const struct version *version = version_now();
        has_failed |= type == LINK_STATE_PERMANENT;
        error_report("cannot store %s.%s: %s; the TPM answers %s until the guest restarts: make "
                     "room or repair the file system, then restart the guest",
                     version->prefix, target, strerror(-r), version->failure_name);
        return TPM_FAIL;
    }
    return TPM_SUCCESS;
}

static TPM_RESULT on_delete(uint32_t tpm_number, const char *name, TPM_BOOL must_exist)
{
    enum link_state_type type = type_by_name(name);

    (void)tpm_number;
    if (!long_command_may_store())
        return TPM_FAIL;
    (void)must_exist; /* what came without it, and says otherwise, has no use for it either */
    if (type == NO_TYPE || type == LINK_STATE_PERMANENT)
        return TPM_FAIL;
    return nvram_remove(type) < 0 ? TPM_FAIL : TPM_SUCCESS;
}

static TPM_RESULT on_get_physical_presence(TPM_BOOL *present, uint32_t tpm_number)
{
    (void)tpm_number;
    *present = FALSE;
    return TPM_SUCCESS;
}

void nvram_register(struct io *io)
{
    struct libtpms_callbacks callbacks = {
        .sizeOfStruct = sizeof(callbacks),
        .tpm_nvram_init = on_nvram_init,
        .tpm_nvram_loaddata = on_load,
        .tpm_nvram_storedata = on_store,
        .tpm_nvram_deletename = on_delete,
        .tpm_io_init = on_init,
        .tpm_io_getlocality = tpm_on_get_locality,
        .tpm_io_getphysicalpresence = on_get_physical_presence,
    };

    store_io = io;
    is_read_only = has_failed = false;
    sharing = SHARING_OURS;
    check(durable_new(&permanent, io) == 0);
    check(TPMLIB_RegisterCallbacks(&callbacks) == TPM_SUCCESS);
}
