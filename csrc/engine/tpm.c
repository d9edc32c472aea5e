#include "tpm.h"

#include <errno.h>
#include <libtpms/tpm_error.h>
#include <libtpms/tpm_nvfilename.h>
#include <libtpms/tpm_tis.h>
#include <openssl/rand.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "activity.h"
#include "bytes.h"
#include "check.h"
#include "clock.h"
#include "custody.h"
#include "digest.h"
#include "error.h"
#include "hold.h"
#include "holder.h"
#include "image.h"
#include "library.h"
#include "long_command.h"
#include "nvram.h"
#include "pages.h"
#include "saved.h"
#include "swtpm_format.h"
#include "turn.h"
#include "version.h"

enum {
    TPM2_CC_CREATE_PRIMARY = 0x131, /* TPM 2.0 part 2, 6.5.2 */
    TPM2_CC_SELF_TEST = 0x143,
    TPM2_CC_STARTUP = 0x144,
    TPM2_CC_SHUTDOWN = 0x145,
    TPM2_CC_CREATE = 0x153,
    TPM2_CC_CREATE_LOADED = 0x191,
    TPM2_SU_CLEAR = 0, /* TPM 2.0 part 2, 6.10 */
    TPM2_SU_STATE = 1,
};

/* In one word, as some look without the lock. */
struct condition {
    uint8_t power;   /* enum tpm_power */
    uint8_t custody; /* enum tpm_custody */
};

struct tpm {
    pthread_mutex_t lock;
    struct turn turn;
    _Atomic struct condition condition;
    enum tpm_custody before; /* of one on standby: what it goes back to */
    bool worked;             /* something ran since the last capture */
    bool worked_before;      /* the same, before the command that runs apart */
    bool served;             /* something ran since the vTPM came to this host, or ever */
    enum link_shutdown said; /* the guest's last TPM2_Shutdown that libtpms accepted since its
                                TPM2_Startup */
    enum activity activity;
    atomic_bool established;   /* as libtpms had it last */
    _Atomic uint32_t locality; /* of commands from the next one on */
    /* By its type: what was stopped without a TPM2_Shutdown, as it may be another host's. */
    struct image stopped[LINK_STATE_VOLATILE + 1];
    bool unlocks; /* the state's files, once QEMU has been given all of it */
    bool is_told; /* a person is, that they cannot be locked */
    /* What a TPM 1.2 was given to start from: */
    struct {
        bool has_permanent, has_volatile;
        bool is_of_use; /* the volatile state says so of */
        struct image saved;
    } given;
};

_Static_assert((int)TPMLIB_TPM_VERSION_1_2 == 0 && (int)TPMLIB_TPM_VERSION_2 == 1,
               "as version.c has them");

_Static_assert(sizeof(((struct link_digests *)0)->permanent_digest) == DIGEST_BYTES &&
                   sizeof(((struct link_digests *)0)->volatile_digest) == DIGEST_BYTES,
               "SHA-256 as digest.h has it");

/* Of the running command; libtpms' callback has no room for a pointer. */
static TPM_MODIFIER_INDICATOR current_locality;

#define locked(tpm) hold_mutex(&(tpm)->lock)

static const enum TPMLIB_StateType library_types[] = {
    [LINK_STATE_PERMANENT] = TPMLIB_STATE_PERMANENT,
    [LINK_STATE_VOLATILE] = TPMLIB_STATE_VOLATILE,
    [LINK_STATE_SAVESTATE] = TPMLIB_STATE_SAVE_STATE,
};

static bool is_state_type(uint32_t type)
{
    return type >= LINK_STATE_PERMANENT && type <= LINK_STATE_SAVESTATE;
}

TPM_RESULT tpm_on_get_locality(TPM_MODIFIER_INDICATOR *locality, uint32_t tpm_number)
{
    (void)tpm_number;
    *locality = current_locality;
    return TPM_SUCCESS;
}

struct tpm *tpm_new(struct io *io)
{
    struct tpm *tpm = calloc(1, sizeof(*tpm));

    check(tpm);
    check(pthread_mutex_init(&tpm->lock, NULL) == 0);
    turn_init(&tpm->turn);
    long_command_init(&tpm->lock, &tpm->turn);
    /* libtpms logs the bytes of a command that failed, authorisation values among them. */
    TPMLIB_SetDebugFD(LINK_FD_LIBRARY_LOG);
    check(TPMLIB_ChooseTPMVersion((TPMLIB_TPMVersion)version_now()->library) == TPM_SUCCESS);
    nvram_register(io);
    return tpm;
}

int tpm_start_long_commands(struct tpm *tpm)
{
    (void)tpm;
    return long_command_start();
}

void tpm_warm_up(void)
{
    uint8_t random, digest[DIGEST_BYTES];

    /* If it fails, what needs it will say so. */
    if (RAND_bytes(&random, sizeof(random)) == 1)
        digest_compute(&random, sizeof(random), digest);
}

uint32_t tpm_message_bytes_max(void)
{
    int n_bytes = 0;

    check(TPMLIB_GetTPMProperty(TPMPROP_TPM_BUFFER_MAX, &n_bytes) == TPM_SUCCESS);
    check(n_bytes >= TPM_HEADER_BYTES);
    return (uint32_t)n_bytes;
}

void tpm_response_init(struct tpm_response *response)
{
    response->n_bytes = 0;
    response->n_allocated = tpm_message_bytes_max();
    response->bytes = calloc(1, response->n_allocated);
    check(response->bytes);
}

void tpm_response_wipe(struct tpm_response *response)
{
    explicit_bzero(response->bytes, response->n_bytes);
}

void tpm_response_deinit(struct tpm_response *response)
{
    explicit_bzero(response->bytes, response->n_allocated);
    free(response->bytes);
}

void tpm_respond_error(struct tpm_response *response, uint32_t code)
{
    response->n_bytes = TPM_HEADER_BYTES;
    put_be16(response->bytes, version_now()->response_tag);
    put_be32(response->bytes + TPM_AT_SIZE, TPM_HEADER_BYTES);
    put_be32(response->bytes + TPM_AT_CODE, code);
}

/* libtpms has a clock, a log, and libcrypto's random numbers. The C library asks what a log is, and
 * goes on without an answer.
 * sandbox: clock_gettime gettimeofday?=EFAULT getrandom getpid
 *          write fstat=EBADF newfstatat=EBADF lseek=ESPIPE */
void tpm_process(uint8_t *command, size_t command_bytes, struct tpm_response *response)
{
    TPM_RESULT result = TPMLIB_Process(&response->bytes, &response->n_bytes, &response->n_allocated,
                                       command, (uint32_t)command_bytes);
    if (result != TPM_SUCCESS || response->n_bytes < TPM_HEADER_BYTES)
        tpm_respond_error(response, version_now()->failure);
}

static uint32_t response_code(const struct tpm_response *response)
{
    return get_be32(response->bytes + TPM_AT_CODE);
}

/* The one writer of what ran. */
static void note_activity(struct tpm *tpm, enum activity_event event)
{
    tpm->activity = activity_after(event, tpm->activity);
}

/* Returns false if libtpms refuses it: TPM_SU_STATE after TPM2_PCR_Allocate, for one. */
static bool send_shutdown(uint8_t type)
{
    uint8_t command[] = {0x80, 0x01, 0, 0, 0, 12, 0, 0, 0x01, TPM2_CC_SHUTDOWN & 0xff, 0, type};
    struct tpm_response response;

    tpm_response_init(&response);
    tpm_process(command, sizeof(command), &response);
    bool is_accepted = response_code(&response) == 0;
    tpm_response_deinit(&response);
    return is_accepted;
}

/* An orderly stop keeps the clock safe and counts no failed try towards a lockout. A guest that
 * sleeps gets its PCRs back, whatever ran after it said so; one that did not ask for that must not
 * find them after a reset, and sessions that it saved would pile up. QEMU holds its main loop for a
 * reset: that this is on the disk the guest's TPM2_Startup waits for, and what ends a vTPM does. A
 * loss of power in between is one without it. */
static void shut_down(struct tpm *tpm)
{
    if (tpm->activity != ACTIVITY_USED || !version_now()->has_shutdown)
        return;
    nvram_defer(true);
    if (tpm->said != LINK_SHUTDOWN_STATE || !send_shutdown(TPM2_SU_STATE))
        send_shutdown(TPM2_SU_CLEAR);
    nvram_defer(false);
}

/* The one writer of power and custody. */
static void set_condition(struct tpm *tpm, enum tpm_power power, enum tpm_custody custody)
{
    tpm->condition = (struct condition){power, custody};
    nvram_set_read_only(custody != TPM_ACTIVE);
    nvram_set_on(power == TPM_ON);
    if (!custody_is_ahead(custody))
        nvram_let_go();
    turn_change(&tpm->turn);
}

static enum tpm_verdict verdict_on(struct tpm *tpm, enum tpm_operation operation)
{
    struct condition now = tpm->condition;

    return custody_verdict(operation, now.power, now.custody);
}

static bool is_on(struct tpm *tpm)
{
    struct condition now = tpm->condition;

    return now.power == TPM_ON;
}

void tpm_look(struct tpm *tpm, enum tpm_power *power, enum tpm_custody *custody)
{
    struct condition now = tpm->condition;

    *power = now.power;
    *custody = now.custody;
}

bool tpm_is_running(struct tpm *tpm)
{
    struct condition now = tpm->condition;

    return now.power == TPM_ON && now.custody != TPM_STANDBY;
}

/* The operation is done, as far as custody goes. */
static void has_done(struct tpm *tpm, enum tpm_operation operation)
{
    struct condition now = tpm->condition;
    enum tpm_custody after = custody_after(operation, now.custody, &tpm->before);

    if (after != now.custody)
        set_condition(tpm, now.power, after);
}

static void say_removed(void)
{
    error_report("the state directory, or what is in it, was removed: what the guest has stored "
                 "since is lost; restore the directory from a copy");
}

/* Returns 0, also if there is none, or a negative errno. */
static int close_journal(void)
{
    int r = nvram_end();

    if (r == -ENOENT)
        say_removed();
    else if (r < 0 && !nvram_has_journal() && !nvram_is_in_room()) /* of that it was said */
        error_report("cannot write %s.%s: %s; it may have a state that was refused, as it could "
                     "not be stored: repair the file system, then see vtpmd inspect",
                     version_now()->prefix, TPM_PERMANENT_ALL_NAME, strerror(-r));
    else if (r < 0 && !nvram_is_in_room())
        error_report("cannot fold %s: %s; the state is safe in it and the file that it continues: "
                     "make room or repair the file system, then restart vtpmd",
                     version_now()->journal_name, strerror(-r));
    return r;
}

static void note_established(struct tpm *tpm)
{
    TPM_BOOL bit = FALSE;

    if (TPM_IO_TpmEstablished_Get(&bit) == TPM_SUCCESS)
        tpm->established = bit;
}

void tpm_say_locked(int r)
{
    const char *other = holder_other();

    if (other) {
        error_report(
            "the vTPM's state is in use by %s: nothing is overwritten, and the TPM answers "
            "%s: stop it there, or, if that is gone for good: vtpmd owner DIR --claim",
            other, version_now()->failure_name);
        return;
    }
    error_report("the vTPM's state cannot be locked, or written, after QEMU was given it: %s; "
                 "nothing is overwritten, and the TPM answers %s: end what uses the state on "
                 "another host, then go on here",
                 strerror(-r), version_now()->failure_name);
}

static TPM_RESULT set_saved_state(enum link_state_type type)
{
    size_t state_bytes;
    const uint8_t *state = long_command_saved(type, &state_bytes);

    return TPMLIB_SetState(library_types[type], state, (uint32_t)state_bytes);
}

/* The guest goes on here after a command was abandoned: libtpms gets the state from before it, as
 * where it would have moved to. Returns false if that fails: the TPM is off. */
static bool take_back(struct tpm *tpm)
{
    has_done(tpm, OP_RUN_ON);
    TPMLIB_Terminate();
    TPM_RESULT result = set_saved_state(LINK_STATE_PERMANENT);
    if (result == TPM_SUCCESS)
        result = set_saved_state(LINK_STATE_VOLATILE);
    if (result == TPM_SUCCESS)
        result = TPMLIB_MainInit();
    long_command_forget();
    if (result == TPM_SUCCESS)
        return true;
    error_report("the TPM cannot go on from before a command that was abandoned: libtpms refuses "
                 "its state with %#x; it answers TPM_RC_FAILURE: restart the guest",
                 result);
    TPMLIB_Terminate();
    struct condition now = tpm->condition;
    set_condition(tpm, TPM_OFF, now.custody);
    return false;
}

/* What was given away, and is to be this host's again, has to have its files for itself. */
static bool lock_files(struct tpm *tpm, enum tpm_operation operation)
{
    struct condition now = tpm->condition;
    enum tpm_custody before = tpm->before;

    if (now.custody == TPM_GIVEN && custody_after(operation, TPM_GIVEN, &before) == TPM_GIVEN)
        return true;
    /* Of two hosts that have started in the same moment one finds the other now. */
    if (now.custody != TPM_GIVEN && (now.custody != TPM_ACTIVE || operation != OP_INIT))
        return true;
    int r = nvram_lock();
    if (r < 0 && !tpm->is_told)
        tpm_say_locked(r);
    tpm->is_told = r < 0;
    return r >= 0;
}

/* Have libtpms, and the files, as the operation needs them. Returns false if that fails: the TPM is
 * off, or its files are another process'. */
static bool prepare(struct tpm *tpm, enum tpm_operation operation)
{
    bool takes_back = long_verdict(operation, long_command_phase()) == LONG_TAKE_BACK;

    if (!lock_files(tpm, takes_back ? OP_RUN_ON : operation))
        return false;
    return !takes_back || take_back(tpm);
}

static void power_off(struct tpm *tpm)
{
    struct condition now = tpm->condition;

    /* What an abandoned command has left gets no TPM2_Shutdown: that would commit it. */
    if (now.custody == TPM_ACTIVE && tpm->activity != ACTIVITY_AS_IT_CAME &&
        prepare(tpm, OP_EXECUTE))
        shut_down(tpm);
    TPMLIB_Terminate();
    long_command_forget();
    set_condition(tpm, TPM_OFF, custody_after(OP_STOP, now.custody, &tpm->before));
}

/* What the TPM's state is: libtpms', or from before a command that runs or was abandoned. The
 * caller frees it, after overwriting it. */
static TPM_RESULT current_state(enum link_state_type type, uint8_t **state, size_t *state_bytes)
{
    bool is_file = type == LINK_STATE_SAVESTATE && !version_now()->has_shutdown;
    const uint8_t *kept = NULL;
    uint32_t length = 0;

    if (!is_file && long_command_phase() == LONG_IDLE) {
        TPM_RESULT result = TPMLIB_GetState(library_types[type], state, &length);
        *state_bytes = length;
        return result;
    }
    if (!is_file)
        kept = long_command_saved(type, state_bytes);
    else if (!nvram_get(type, &kept, state_bytes)) /* libtpms would make one (saved.h) */
        *state_bytes = 0;
    *state = malloc(*state_bytes + 1); /* not NULL for none */
    if (!*state)
        return TPM_SIZE;
    if (*state_bytes > 0)
        memcpy(*state, kept, *state_bytes);
    return TPM_SUCCESS;
}

static void forget_stopped(struct tpm *tpm)
{
    for (int type = LINK_STATE_PERMANENT; type <= LINK_STATE_VOLATILE; type++)
        image_deinit(&tpm->stopped[type]);
}

/* What QEMU was given may be another host's soon, and what has come, and was not used, may still be
 * another host's. */
static bool may_be_elsewhere(const struct tpm *tpm, struct condition condition)
{
    return condition.custody == TPM_GIVEN || tpm->activity == ACTIVITY_AS_IT_CAME;
}

/* What may be elsewhere: its TPM2_Shutdown, which would be written, has to wait until its guest is
 * started here again. */
static void keep_stopped(struct tpm *tpm)
{
    for (int type = LINK_STATE_PERMANENT; type <= LINK_STATE_VOLATILE; type++) {
        struct image *image = &tpm->stopped[type];
        if (current_state(type, &image->bytes, &image->n_bytes) != TPM_SUCCESS) {
            *image = (struct image){0};
            forget_stopped(tpm);
            return;
        }
        image->exists = true;
    }
}

/* It is this host's after all: have it on as it was, to be stopped as what is this host's. */
static void undo_stop(struct tpm *tpm)
{
    TPM_RESULT result = TPM_SUCCESS;

    for (int type = LINK_STATE_PERMANENT; type <= LINK_STATE_VOLATILE; type++)
        if (result == TPM_SUCCESS)
            result = TPMLIB_SetState(library_types[type], tpm->stopped[type].bytes,
                                     (uint32_t)tpm->stopped[type].n_bytes);
    if (result == TPM_SUCCESS && (result = TPMLIB_MainInit()) != TPM_SUCCESS)
        TPMLIB_Terminate();
    struct condition now = tpm->condition;
    if (result == TPM_SUCCESS)
        set_condition(tpm, TPM_ON, now.custody);
}

static void forget_given(struct tpm *tpm)
{
    image_deinit(&tpm->given.saved);
    memset(&tpm->given, 0, sizeof(tpm->given));
}

/* As if it had not been on. */
static void let_go(struct tpm *tpm)
{
    TPMLIB_Terminate();
    forget_given(tpm);
    set_condition(tpm, TPM_OFF, tpm->before);
}

/* Custody's verdict, once what is done then need not wait for a command that runs apart. */
static enum tpm_verdict wait_for_turn(struct tpm *tpm, enum tpm_operation operation)
{
    enum tpm_verdict verdict;

    while ((verdict = verdict_on(tpm, operation)) == VERDICT_DO &&
           long_verdict(operation, long_command_phase()) == LONG_WAIT)
        turn_wait(&tpm->turn, &tpm->lock);
    return verdict;
}

/* Returns true if an operation is to be done now; else `*result` is its answer. */
static bool may(struct tpm *tpm, enum tpm_operation operation, TPM_RESULT *result)
{
    enum tpm_verdict verdict = wait_for_turn(tpm, operation);

    if (verdict == VERDICT_LET_GO) {
        let_go(tpm);
        verdict = verdict_on(tpm, operation);
    }
    *result = TPM_SUCCESS;
    if (verdict == VERDICT_NOT_NOW)
        *result = TPM_BAD_ORDINAL;
    if (verdict == VERDICT_FAIL || (verdict == VERDICT_DO && !prepare(tpm, operation)))
        *result = TPM_FAIL;
    return verdict == VERDICT_DO && *result == TPM_SUCCESS;
}

/* A TPM 1.2 has started from what has come: so its saved state is that one's (saved.h). */
static TPM_RESULT settle_saved(struct tpm *tpm)
{
    struct image *saved = &tpm->given.saved;
    bool is_there = saved->exists && (!tpm->given.has_volatile || tpm->given.is_of_use);
    int r = 0;

    if (!tpm->given.has_permanent)
        return TPM_SUCCESS;
    if (is_there)
        r = nvram_store(LINK_STATE_SAVESTATE, saved->bytes, saved->n_bytes);
    else if (nvram_may_have(LINK_STATE_SAVESTATE))
        r = nvram_remove(LINK_STATE_SAVESTATE);
    return r < 0 ? TPM_FAIL : TPM_SUCCESS;
}

static TPM_RESULT power_on(struct tpm *tpm, enum tpm_custody custody, enum link_shutdown said)
{
    struct condition before = tpm->condition;
    bool resumes = custody == TPM_ACTIVE && nvram_may_have(LINK_STATE_VOLATILE);

    forget_stopped(tpm);
    TPM_RESULT result = TPMLIB_MainInit();
    if (result == TPM_SUCCESS && custody == TPM_ACTIVE)
        result = settle_saved(tpm);
    if (custody == TPM_ACTIVE)
        forget_given(tpm); /* else it is admitted with it */
    /* A volatile state serves once: resumed from a second time, it would bring back PCRs that the
     * guest has extended since. */
    if (result == TPM_SUCCESS && resumes && nvram_remove(LINK_STATE_VOLATILE) < 0)
        result = TPM_FAIL;
    if (result != TPM_SUCCESS)
        TPMLIB_Terminate();
    /* Who was not told may see it. */
    bool is_told =
        custody != TPM_ACTIVE || (said != LINK_SHUTDOWN_NONE && version_now()->has_shutdown);
    tpm->said = is_told ? said : nvram_last_shutdown();
    note_activity(tpm, ACTIVITY_STARTED);
    tpm->worked = true;
    if (result != TPM_SUCCESS) {
        set_condition(tpm, TPM_OFF, before.custody);
        return result;
    }
    note_established(tpm);
    set_condition(tpm, TPM_ON, custody);
    return TPM_SUCCESS;
}

/* It has not come: what was another host's stays so. */
static void undo_init(struct tpm *tpm, struct condition before)
{
    if (before.custody == TPM_FENCED || before.custody == TPM_RECLAIMING)
        set_condition(tpm, TPM_OFF, TPM_FENCED);
}

/* Our own from now on, and off, whatever it was `*before`. Returns false if that is refused:
 * `*result` is the answer. */
static bool begin_init(struct tpm *tpm, enum tpm_operation operation, struct condition *before,
                       TPM_RESULT *result)
{
    if (!may(tpm, operation, result))
        return false;
    *before = tpm->condition;
    has_done(tpm, OP_EXECUTE); /* a guest that is reset here was running on here */
    if (operation == OP_INIT && may_be_elsewhere(tpm, *before) &&
        tpm->stopped[LINK_STATE_PERMANENT].exists)
        undo_stop(tpm);
    note_activity(tpm, ACTIVITY_RESET);
    if (is_on(tpm))
        power_off(tpm);
    has_done(tpm, operation);
    return true;
}

TPM_RESULT tpm_init(struct tpm *tpm, bool has_come)
{
    struct condition before;
    TPM_RESULT result;

    locked(tpm);
    if (!begin_init(tpm, has_come ? OP_INIT_CAME : OP_INIT, &before, &result))
        return result;
    result = power_on(tpm, TPM_ACTIVE, LINK_SHUTDOWN_NONE);
    if (result != TPM_SUCCESS)
        undo_init(tpm, before);
    return result;
}

/* It is no snapshot: as long as nothing ran, it is the state that it was where it has come from. */
static bool is_as_it_came(const struct checkpoint_lineage *lineage)
{
    struct checkpoint_lineage now;

    return nvram_get_lineage(&now) && now.generation == lineage->generation;
}

TPM_RESULT tpm_init_come(struct tpm *tpm, const struct checkpoint_lineage *lineage)
{
    struct condition before;
    TPM_RESULT result;

    locked(tpm);
    if (!begin_init(tpm, OP_INIT_CAME, &before, &result))
        return result;
    if (nvram_expect(lineage) < 0) {
        undo_init(tpm, before);
        return TPM_FAIL;
    }
    result = power_on(tpm, TPM_ACTIVE, lineage->sleeps ? LINK_SHUTDOWN_STATE : LINK_SHUTDOWN_NONE);
    /* One that could not be stored leaves libtpms on, in failure mode: it has not come. */
    if (!nvram_has_come() && result == TPM_SUCCESS) {
        power_off(tpm);
        result = TPM_FAIL;
    }
    if (result != TPM_SUCCESS)
        undo_init(tpm, before);
    if (result == TPM_SUCCESS && is_as_it_came(lineage))
        note_activity(tpm, ACTIVITY_CAME);
    return result;
}

bool tpm_has_state(struct tpm *tpm)
{
    locked(tpm);
    wait_for_turn(tpm, OP_HAS_STATE);
    return nvram_may_have(LINK_STATE_PERMANENT);
}

bool tpm_get_lineage(struct tpm *tpm, struct checkpoint_lineage *lineage)
{
    locked(tpm);
    wait_for_turn(tpm, OP_GET_LINEAGE);
    bool is_known = nvram_get_lineage(lineage);
    lineage->sleeps = tpm->said == LINK_SHUTDOWN_STATE;
    return is_known;
}

/* What a TPM 1.2 has to know of it to settle its saved state. */
static void note_given(struct tpm *tpm, uint32_t type, const uint8_t *state, size_t state_bytes)
{
    if (version_now()->has_shutdown)
        return;
    if (type == LINK_STATE_PERMANENT) {
        forget_given(tpm); /* what follows goes with it */
        tpm->given.has_permanent = true;
    }
    if (type == LINK_STATE_VOLATILE) {
        tpm->given.has_volatile = state_bytes > 0;
        tpm->given.is_of_use = saved_is_of_use(state, state_bytes);
    }
}

static TPM_RESULT set_state(struct tpm *tpm, uint32_t type, const uint8_t *state,
                            size_t state_bytes)
{
    /* libtpms would take it at a TPM_Startup(ST_STATE), whatever was executed before. */
    if (type == LINK_STATE_SAVESTATE && !version_now()->has_shutdown) {
        image_deinit(&tpm->given.saved);
        bool is_kept = state_bytes == 0 || image_set(&tpm->given.saved, state, state_bytes) >= 0;
        return is_kept ? TPM_SUCCESS : TPM_SIZE;
    }
    TPM_RESULT result =
        TPMLIB_SetState(library_types[type], state_bytes ? state : NULL, (uint32_t)state_bytes);

    if (result == TPM_SUCCESS) {
        note_given(tpm, type, state, state_bytes);
    } else { /* libtpms has dropped the permanent state, too */
        nvram_unprepare();
        forget_given(tpm);
    }
    return result;
}

/* libtpms drops all that it was given when it refuses a state, and has no other way: NULL would be
 * an empty state, from which it makes a new TPM. */
static void drop_given_states(struct tpm *tpm)
{
    static const unsigned char no_state = 0;

    set_state(tpm, LINK_STATE_PERMANENT, &no_state, sizeof(no_state));
}

static TPM_RESULT power_on_held(struct tpm *tpm, enum link_shutdown said)
{
    struct condition now = tpm->condition;

    return power_on(tpm, custody_after(OP_INIT_STANDBY, now.custody, &tpm->before), said);
}

TPM_RESULT tpm_init_standby(struct tpm *tpm, enum link_shutdown said,
                            const struct nvram_states *states)
{
    TPM_RESULT result;

    locked(tpm);
    if (!may(tpm, OP_INIT_STANDBY, &result))
        return result;
    if (is_on(tpm))
        power_off(tpm);
    drop_given_states(tpm);
    if (nvram_hold(states->permanent, states->permanent_bytes) < 0)
        return TPM_SIZE;
    if (states->saved_bytes > 0 &&
        image_set(&tpm->given.saved, states->saved, states->saved_bytes) < 0)
        return TPM_SIZE;
    nvram_give(states);
    result = power_on_held(tpm, said);
    nvram_give(NULL);
    return result;
}

TPM_RESULT tpm_expect(struct tpm *tpm)
{
    TPM_RESULT result;

    locked(tpm);
    if (may(tpm, OP_EXPECT, &result))
        has_done(tpm, OP_EXPECT);
    return result;
}

TPM_RESULT tpm_admit(struct tpm *tpm, const struct checkpoint_lineage *lineage, bool goes_back)
{
    TPM_RESULT result;

    locked(tpm);
    if (goes_back && !nvram_is_adopting())
        return TPM_SUCCESS;
    if (!may(tpm, OP_ADMIT, &result))
        return result;
    if (nvram_adopt(lineage, goes_back, &tpm->given.saved) < 0)
        return TPM_FAIL;
    if (goes_back)
        return TPM_SUCCESS;
    tpm->served = false;
    forget_given(tpm);
    has_done(tpm, OP_ADMIT);
    return TPM_SUCCESS;
}

TPM_RESULT tpm_await(struct tpm *tpm, bool is_so)
{
    enum tpm_operation operation = is_so ? OP_AWAIT : OP_AWAIT_NO_MORE;
    TPM_RESULT result;

    locked(tpm);
    if (may(tpm, operation, &result))
        has_done(tpm, operation);
    return result;
}

void tpm_let_go(struct tpm *tpm)
{
    TPM_RESULT result;

    locked(tpm);
    if (may(tpm, OP_LET_GO, &result))
        has_done(tpm, OP_LET_GO);
}

TPM_RESULT tpm_stop(struct tpm *tpm)
{
    TPM_RESULT result;

    locked(tpm);
    if (!may(tpm, OP_STOP, &result))
        return result;
    struct condition now = tpm->condition;
    if (may_be_elsewhere(tpm, now) && version_now()->has_shutdown)
        keep_stopped(tpm);
    power_off(tpm);
    return TPM_SUCCESS;
}

void tpm_rest(struct tpm *tpm)
{
    locked(tpm);
    struct condition now = tpm->condition;
    if (now.power == TPM_OFF && now.custody == TPM_ACTIVE)
        close_journal();
}

TPM_RESULT tpm_stop_fenced(struct tpm *tpm)
{
    TPM_RESULT result;

    locked(tpm);
    if (!may(tpm, OP_STOP_FENCED, &result))
        return result;
    if (is_on(tpm))
        power_off(tpm);
    has_done(tpm, OP_STOP_FENCED);
    return TPM_SUCCESS;
}

/* What QEMU was given may be started elsewhere, or never: then it is the directory that counts. */
static enum tpm_left leave_given(void)
{
    if (nvram_is_in_room())
        return TPM_LEFT_JOURNAL; /* it was said that it is not in its file */
    if (!nvram_has_journal())
        return TPM_LEFT_WHOLE;
    error_report("%s stays: QEMU was given the state, and its guest has not run on here; if it "
                 "runs nowhere else, vtpmd fold makes the directory swtpm's to take",
                 version_now()->journal_name);
    return TPM_LEFT_JOURNAL;
}

static enum tpm_left leave_own(void)
{
    int r = close_journal();
    if (r == -ENOENT)
        return TPM_LEFT_NOTHING;
    if (r < 0)
        return TPM_LEFT_JOURNAL;
    if (!nvram_is_removed())
        return TPM_LEFT_WHOLE;
    say_removed();
    return TPM_LEFT_NOTHING;
}

enum tpm_left tpm_free(struct tpm *tpm)
{
    tpm_stop(tpm);
    struct condition now = tpm->condition;
    enum tpm_left left = now.custody == TPM_GIVEN ? leave_given() : leave_own();
    forget_stopped(tpm);
    forget_given(tpm);
    long_command_deinit();
    nvram_deinit();
    turn_deinit(&tpm->turn);
    pthread_mutex_destroy(&tpm->lock);
    free(tpm);
    return left;
}

/* Custody's verdict on a command, or that it waits for one that was abandoned to run out. Without
 * the lock it is as it was just now. */
static enum tpm_verdict verdict_on_command(struct tpm *tpm)
{
    enum tpm_verdict verdict = verdict_on(tpm, OP_EXECUTE);
    bool waits = long_verdict(OP_EXECUTE, long_command_phase()) == LONG_WAIT;

    return verdict == VERDICT_DO && waits ? VERDICT_WAIT : verdict;
}

static bool has_to_wait(void *tpm)
{
    return verdict_on_command(tpm) == VERDICT_WAIT;
}

/* Without the lock: who has that may wait for the disk. Returns false if it took too long since the
 * first of these waits, which `*until_ms` is 0 before. */
static bool wait_until_settled(struct tpm *tpm, int64_t *until_ms)
{
    if (!has_to_wait(tpm))
        return true;
    if (!*until_ms)
        *until_ms = clock_ms() + version_now()->command_wait_ms;
    return turn_wait_apart(&tpm->turn, has_to_wait, tpm, *until_ms);
}

/* Of a TPM 1.2 any command may have made an end of its saved state. */
static void note_power(struct tpm *tpm, uint32_t command_code, uint16_t type, bool is_accepted)
{
    if (!version_now()->has_shutdown) {
        tpm->said = nvram_last_shutdown();
    } else if (!is_accepted) {
        return;
    } else if (command_code == TPM2_CC_STARTUP) {
        tpm->said = LINK_SHUTDOWN_NONE;
    } else if (command_code == TPM2_CC_SHUTDOWN) {
        tpm->said = type == TPM2_SU_STATE ? LINK_SHUTDOWN_STATE : LINK_SHUTDOWN_CLEAR;
        note_activity(tpm, ACTIVITY_SAID);
    }
}

/* Something of the guest's is about to run. Returns 0 or a negative errno: then it must not. */
static int begin_work(struct tpm *tpm, enum tpm_operation operation)
{
    has_done(tpm, operation); /* it is seen to run on */
    /* A volatile state that was stored serves once: not after a crash, if the guest went on. */
    int r = nvram_may_have(LINK_STATE_VOLATILE) ? nvram_remove(LINK_STATE_VOLATILE) : 0;
    if (r < 0) {
        error_report("cannot remove %s.%s: %s; the TPM answers %s until it can: repair the file "
                     "system",
                     version_now()->prefix, TPM_VOLATILESTATE_NAME, strerror(-r),
                     version_now()->retry_name);
        return r;
    }
    tpm->worked_before = tpm->worked;
    tpm->worked = tpm->served = true;
    note_activity(tpm, ACTIVITY_WORKED);
    current_locality = tpm->locality;
    return 0;
}

/* How long it takes is the guest's choice: which key it wants. */
static bool may_be_long(uint32_t command_code, const uint8_t *command, size_t command_bytes)
{
    if (!version_now()->abandons)
        return false;
    /* The last parameter of TPM2_SelfTest: whether it is to be full. */
    if (command_code == TPM2_CC_SELF_TEST)
        return command[command_bytes - 1] != 0;
    return command_code == TPM2_CC_CREATE_PRIMARY || command_code == TPM2_CC_CREATE ||
           command_code == TPM2_CC_CREATE_LOADED;
}

/* Returns false if there is no state to go back to: nothing is saved then. */
static bool save_states(void)
{
    static const enum link_state_type types[] = {LINK_STATE_PERMANENT, LINK_STATE_VOLATILE,
                                                 LINK_STATE_SAVESTATE};
    TPM_RESULT result = TPM_SUCCESS;

    for (size_t i = 0; i < sizeof(types) / sizeof(*types) && result == TPM_SUCCESS; i++) {
        unsigned char *state = NULL;
        uint32_t state_bytes = 0;
        result = TPMLIB_GetState(library_types[types[i]], &state, &state_bytes);
        if (result == TPM_SUCCESS)
            long_command_save(types[i], state, state_bytes);
    }
    if (result != TPM_SUCCESS)
        long_command_forget();
    return result == TPM_SUCCESS;
}

/* Returns false if the guest has stopped meanwhile: nothing has happened. */
static bool execute(uint32_t command_code, uint8_t *command, size_t command_bytes,
                    struct tpm_response *response)
{
    if (long_command_is_armed() && may_be_long(command_code, command, command_bytes) &&
        save_states())
        return long_command_execute(command, command_bytes, response);
    tpm_process(command, command_bytes, response);
    return true;
}

TPM_RESULT tpm_arm(struct tpm *tpm, bool is_so)
{
    (void)tpm;
    return long_command_arm(is_so) ? TPM_SUCCESS : TPM_BAD_ORDINAL;
}

bool tpm_abandon(struct tpm *tpm)
{
    locked(tpm);
    if (!long_command_abandon())
        return false;
    tpm->worked = tpm->worked_before;
    TPMLIB_CancelCommand(); /* it is of no use any more */
    return true;
}

/* The verdict is that it is done. */
static void do_execute(struct tpm *tpm, uint8_t *command, size_t command_bytes,
                       struct tpm_response *response)
{
    if (!prepare(tpm, OP_EXECUTE)) {
        tpm_respond_error(response, version_now()->failure);
        return;
    }
    if (begin_work(tpm, OP_EXECUTE) < 0) {
        tpm_respond_error(response, version_now()->retry);
        return;
    }
    uint32_t command_code = get_be32(command + TPM_AT_CODE);
    /* The only parameter of TPM2_Shutdown is the last, also after an audit session. */
    uint16_t last_parameter = get_be16(command + command_bytes - 2);
    if (!execute(command_code, command, command_bytes, response)) {
        tpm_respond_error(response, version_now()->retry);
        return;
    }
    note_established(tpm);
    note_power(tpm, command_code, last_parameter, response_code(response) == 0);
}

/* Returns false if it has to wait: there is no response. */
static bool try_to_execute(struct tpm *tpm, uint8_t *command, size_t command_bytes,
                           struct tpm_response *response)
{
    locked(tpm);
    enum tpm_verdict verdict = verdict_on_command(tpm);
    if (verdict == VERDICT_DO)
        do_execute(tpm, command, command_bytes, response);
    if (verdict == VERDICT_FAIL)
        tpm_respond_error(response, version_now()->failure);
    return verdict != VERDICT_WAIT;
}

void tpm_execute(struct tpm *tpm, uint8_t *command, size_t command_bytes,
                 struct tpm_response *response)
{
    int64_t until_ms = 0;

    check(command_bytes >= TPM_HEADER_BYTES && command_bytes <= tpm_message_bytes_max());
    while (wait_until_settled(tpm, &until_ms))
        if (try_to_execute(tpm, command, command_bytes, response))
            return;
    tpm_respond_error(response, version_now()->retry);
}

TPM_RESULT tpm_cancel(struct tpm *tpm)
{
    return verdict_on(tpm, OP_CANCEL) == VERDICT_DO ? TPMLIB_CancelCommand() : TPM_BAD_ORDINAL;
}

TPM_RESULT tpm_get_established(struct tpm *tpm, bool *established)
{
    *established = tpm->established;
    return verdict_on(tpm, OP_GET_ESTABLISHED) == VERDICT_DO ? TPM_SUCCESS : TPM_BAD_ORDINAL;
}

TPM_RESULT tpm_reset_established(struct tpm *tpm, uint32_t locality)
{
    TPM_RESULT result;

    locked(tpm);
    if (!may(tpm, OP_RESET_ESTABLISHED, &result))
        return result;
    if (locality > TPM_LOCALITY_MAX)
        return TPM_BAD_LOCALITY;
    if (begin_work(tpm, OP_RESET_ESTABLISHED) < 0)
        return TPM_FAIL;
    current_locality = locality;
    result = TPM_IO_TpmEstablished_Reset();
    note_established(tpm);
    return result;
}

TPM_RESULT tpm_set_locality(struct tpm *tpm, uint32_t locality)
{
    if (locality > TPM_LOCALITY_MAX)
        return TPM_BAD_LOCALITY;
    tpm->locality = locality;
    return TPM_SUCCESS;
}

static bool may_hash(struct tpm *tpm, TPM_RESULT *result)
{
    if (!may(tpm, OP_HASH, result))
        return false;
    *result = begin_work(tpm, OP_HASH) < 0 ? TPM_FAIL : TPM_SUCCESS;
    return *result == TPM_SUCCESS;
}

TPM_RESULT tpm_hash_start(struct tpm *tpm)
{
    TPM_RESULT result;

    locked(tpm);
    return may_hash(tpm, &result) ? TPM_IO_Hash_Start() : result;
}

TPM_RESULT tpm_hash_data(struct tpm *tpm, const uint8_t *data, size_t data_bytes)
{
    TPM_RESULT result;

    locked(tpm);
    return may_hash(tpm, &result) ? TPM_IO_Hash_Data(data, (uint32_t)data_bytes) : result;
}

TPM_RESULT tpm_hash_end(struct tpm *tpm)
{
    TPM_RESULT result;

    locked(tpm);
    if (!may_hash(tpm, &result))
        return result;
    result = TPM_IO_Hash_End();
    note_established(tpm);
    return result;
}

TPM_RESULT tpm_store_volatile(struct tpm *tpm)
{
    unsigned char *state = NULL;
    uint32_t state_bytes = 0;
    TPM_RESULT result;

    locked(tpm);
    if (!may(tpm, OP_STORE_VOLATILE, &result))
        return result;
    result = TPMLIB_VolatileAll_Store(&state, &state_bytes);
    if (result != TPM_SUCCESS)
        return result;
    has_done(tpm, OP_STORE_VOLATILE);
    int r = nvram_store(LINK_STATE_VOLATILE, state, state_bytes);
    if (r < 0)
        error_report("cannot store %s.%s: %s; make room or repair the file system, then ask again",
                     version_now()->prefix, TPM_VOLATILESTATE_NAME, strerror(-r));
    explicit_bzero(state, state_bytes);
    free(state);
    /* The directory then is one that swtpm can resume from. */
    if (r >= 0)
        r = close_journal();
    nvram_set_on(true);
    return r < 0 ? TPM_FAIL : TPM_SUCCESS;
}

TPM_RESULT tpm_get_state(struct tpm *tpm, uint32_t type, uint8_t **state, size_t *state_bytes)
{
    enum tpm_operation operation = type == LINK_STATE_PERMANENT ? OP_GET_PERMANENT : OP_GET_OTHER;
    TPM_RESULT result;

    locked(tpm);
    if (!may(tpm, operation, &result))
        return result;
    if (!is_state_type(type))
        return TPM_BAD_PARAMETER;
    result = current_state(type, state, state_bytes);
    if (result == TPM_SUCCESS && *state_bytes == 0)
        result = TPM_BLOB_NOT_FOUND;
    if (result == TPM_SUCCESS)
        has_done(tpm, operation);
    return result;
}

void tpm_share(struct tpm *tpm, bool unlocks, bool is_to_come)
{
    locked(tpm);
    tpm->unlocks = unlocks;
    if (!is_to_come)
        return;
    nvram_start_unlocked();
    set_condition(tpm, TPM_OFF, TPM_GIVEN);
}

void tpm_beware(struct tpm *tpm)
{
    locked(tpm);
    nvram_beware();
}

void tpm_unlock_given(struct tpm *tpm)
{
    locked(tpm);
    struct condition now = tpm->condition;
    if (!tpm->unlocks || now.custody != TPM_GIVEN)
        return;
    int r = nvram_unlock();
    if (r < 0)
        error_report("the vTPM's state stays locked, as its journal cannot be folded: %s; the "
                     "destination cannot have it: make room or repair the file system, then "
                     "migrate again",
                     strerror(-r));
}

int tpm_lock(struct tpm *tpm)
{
    locked(tpm);
    return nvram_lock();
}

/* Returns true if a state may be set now; else `*result` is its answer. */
static bool may_set(struct tpm *tpm, uint32_t type, size_t state_bytes, TPM_RESULT *result)
{
    if (!may(tpm, OP_SET_STATE, result))
        return false;
    forget_stopped(tpm); /* another state than that is to be started */
    /* libtpms would make a new TPM from an empty permanent state. */
    if (!is_state_type(type) || (type == LINK_STATE_PERMANENT && state_bytes == 0))
        *result = TPM_BAD_PARAMETER;
    return *result == TPM_SUCCESS;
}

TPM_RESULT tpm_set_state(struct tpm *tpm, uint32_t type, const uint8_t *state, size_t state_bytes)
{
    TPM_RESULT result;

    locked(tpm);
    return may_set(tpm, type, state_bytes, &result) ? set_state(tpm, type, state, state_bytes)
                                                    : result;
}

TPM_RESULT tpm_set_come(struct tpm *tpm, const struct checkpoint_lineage *lineage,
                        const uint8_t *state, size_t state_bytes)
{
    TPM_RESULT result;

    locked(tpm);
    if (!may_set(tpm, LINK_STATE_PERMANENT, state_bytes, &result))
        return result;
    nvram_prepare(state, state_bytes, lineage);
    return set_state(tpm, LINK_STATE_PERMANENT, state, state_bytes);
}

void tpm_await_state(struct tpm *tpm)
{
    locked(tpm);
    nvram_await();
}

void tpm_unawait_state(struct tpm *tpm)
{
    locked(tpm);
    nvram_unawait();
}

TPM_RESULT tpm_store_permanent(struct tpm *tpm)
{
    TPM_RESULT result;

    locked(tpm);
    if (!may(tpm, OP_STORE_PERMANENT, &result))
        return result;
    return nvram_store_permanent(&tpm->lock) < 0 ? TPM_FAIL : TPM_SUCCESS;
}

TPM_RESULT tpm_forget_state(struct tpm *tpm)
{
    TPM_RESULT result;

    locked(tpm);
    if (may(tpm, OP_FORGET_STATE, &result))
        drop_given_states(tpm);
    return result;
}

TPM_RESULT tpm_set_version(struct tpm *tpm, uint32_t number)
{
    TPM_RESULT result;

    locked(tpm);
    if (!may(tpm, OP_SET_UP, &result))
        return result;
    if (!version_set(number))
        return TPM_BAD_VERSION;
    result = TPMLIB_ChooseTPMVersion((TPMLIB_TPMVersion)version_now()->library);
    return result == TPM_SUCCESS ? TPM_SUCCESS : TPM_BAD_VERSION;
}

TPM_RESULT tpm_load_state(struct tpm *tpm, uint32_t type, const uint8_t *state, size_t state_bytes)
{
    TPM_RESULT result;

    locked(tpm);
    if (!may(tpm, OP_SET_UP, &result))
        return result;
    if (!is_state_type(type))
        return TPM_BAD_PARAMETER;
    return nvram_load(type, state, state_bytes) < 0 ? TPM_SIZE : TPM_SUCCESS;
}

TPM_RESULT tpm_set_profile(struct tpm *tpm, const char *profile)
{
    TPM_RESULT result;

    locked(tpm);
    return may(tpm, OP_SET_UP, &result) ? library_set_profile(profile) : result;
}

TPM_RESULT tpm_set_journal(struct tpm *tpm, const struct journal_settings *settings,
                           struct store *store, uint64_t loaded, bool is_known)
{
    TPM_RESULT result;

    locked(tpm);
    if (!may(tpm, OP_SET_UP, &result))
        return result;
    return nvram_set_journal(settings, store, loaded, is_known) < 0 ? TPM_BAD_ORDINAL : TPM_SUCCESS;
}

TPM_RESULT tpm_set_key(struct tpm *tpm, const struct cipher_key *key)
{
    TPM_RESULT result;

    locked(tpm);
    if (!may(tpm, OP_SET_UP, &result))
        return result;
    return nvram_set_key(key) < 0 ? TPM_BAD_ORDINAL : TPM_SUCCESS;
}

const struct cipher_key *tpm_key(struct tpm *tpm)
{
    (void)tpm;
    return nvram_key();
}

TPM_RESULT tpm_set_anchor(struct tpm *tpm, const struct anchor *anchor)
{
    TPM_RESULT result;

    locked(tpm);
    if (!may(tpm, OP_SET_UP, &result))
        return result;
    return nvram_set_anchor(anchor) < 0 ? TPM_BAD_ORDINAL : TPM_SUCCESS;
}

void tpm_raise_generation(struct tpm *tpm, struct store *store, uint32_t type, uint64_t floor)
{
    locked(tpm);
    wait_for_turn(tpm, OP_RAISE_GENERATION);
    store_raise_generation(store, type, floor);
}

/* Of a TPM 1.2, and of that only. */
static int append_saved(uint8_t **state, size_t *state_bytes)
{
    const uint8_t *saved = NULL;
    size_t saved_bytes = 0;

    if (version_now()->has_shutdown)
        return 0;
    if (!nvram_get(LINK_STATE_SAVESTATE, &saved, &saved_bytes))
        saved_bytes = 0;
    return saved_append(state, state_bytes, saved, saved_bytes);
}

static TPM_RESULT capture(struct store *store, enum link_state_type type)
{
    uint8_t *state = NULL;
    size_t state_bytes = 0;
    uint64_t generation;

    TPM_RESULT result = current_state(type, &state, &state_bytes);
    if (result != TPM_SUCCESS)
        return result;
    int r = type == LINK_STATE_VOLATILE ? append_saved(&state, &state_bytes) : 0;
    if (r >= 0)
        r = store_capture(store, type, state, state_bytes, &generation);
    explicit_bzero(state, state_bytes);
    free(state);
    return r < 0 ? TPM_FAIL : TPM_SUCCESS;
}

TPM_RESULT tpm_capture(struct tpm *tpm, struct store *store, bool *worked, enum link_shutdown *said)
{
    TPM_RESULT result;

    locked(tpm);
    if (!may(tpm, OP_CAPTURE, &result))
        return result;
    /* Beside a command that runs, what is captured is from before it. */
    bool *has_worked = long_command_phase() == LONG_RUNNING ? &tpm->worked_before : &tpm->worked;
    *worked = *has_worked;
    *said = tpm->said;
    if (!*worked)
        return TPM_SUCCESS;
    result = capture(store, LINK_STATE_PERMANENT);
    if (result == TPM_SUCCESS)
        result = capture(store, LINK_STATE_VOLATILE);
    *has_worked = result != TPM_SUCCESS;
    return result;
}

static TPM_RESULT copy_kept(enum link_state_type type, struct image *image)
{
    const uint8_t *kept;
    size_t n_bytes;

    if (!nvram_get(type, &kept, &n_bytes))
        return TPM_SUCCESS;
    return image_set(image, kept, n_bytes) < 0 ? TPM_SIZE : TPM_SUCCESS;
}

TPM_RESULT tpm_copy(struct tpm *tpm, struct tpm_copy *copy)
{
    struct image *states = copy->states, *following = &states[LINK_STATE_VOLATILE];
    TPM_RESULT result;

    *copy = (struct tpm_copy){0};
    locked(tpm);
    if (!may(tpm, OP_COPY, &result))
        return result;
    if (nvram_has_failed())
        return TPM_IOERROR;
    if (!nvram_get_lineage(&copy->lineage))
        copy->lineage = (struct checkpoint_lineage){0};
    /* Not libtpms' own: the lineage is of what was committed, and that is all that libtpms has. */
    result = copy_kept(LINK_STATE_PERMANENT, &states[LINK_STATE_PERMANENT]);
    if (result == TPM_SUCCESS)
        result = current_state(LINK_STATE_VOLATILE, &following->bytes, &following->n_bytes);
    if (result == TPM_SUCCESS && !version_now()->has_shutdown)
        result = copy_kept(LINK_STATE_SAVESTATE, &states[LINK_STATE_SAVESTATE]);
    return result;
}

void tpm_copy_deinit(struct tpm_copy *copy)
{
    for (int type = LINK_STATE_PERMANENT; type <= LINK_STATE_SAVESTATE; type++)
        image_deinit(&copy->states[type]);
}

bool tpm_has_worked(struct tpm *tpm)
{
    locked(tpm);
    return tpm->worked;
}

TPM_RESULT tpm_retire(struct tpm *tpm, bool unserved)
{
    enum tpm_operation operation = unserved ? OP_RETIRE_UNSERVED : OP_RETIRE_UNCHANGED;
    TPM_RESULT result;

    locked(tpm);
    if (!may(tpm, operation, &result))
        return result;
    /* What is on standby has served nobody, whatever this host did with the vTPM before. */
    struct condition now = tpm->condition;
    bool served = tpm->served && !custody_is_ahead(now.custody);
    if (unserved ? served : tpm->worked)
        return TPM_FAIL;
    tpm->served = served;
    has_done(tpm, operation);
    return TPM_SUCCESS;
}

void tpm_run_on(struct tpm *tpm)
{
    locked(tpm);
    wait_for_turn(tpm, OP_RUN_ON);
    has_done(tpm, OP_RUN_ON);
}

TPM_RESULT tpm_unretire(struct tpm *tpm)
{
    TPM_RESULT result;

    locked(tpm);
    if (may(tpm, OP_UNRETIRE, &result))
        has_done(tpm, OP_UNRETIRE);
    return result;
}

TPM_RESULT tpm_set_buffer_size(struct tpm *tpm, uint32_t wanted, uint32_t sizes[3])
{
    if (wanted && verdict_on(tpm, OP_SET_BUFFER_SIZE) != VERDICT_DO)
        return TPM_BAD_ORDINAL;
    sizes[0] = TPMLIB_SetBufferSize(wanted, &sizes[1], &sizes[2]);
    return TPM_SUCCESS;
}

char *tpm_get_info(struct tpm *tpm, uint32_t flags)
{
    locked(tpm);
    wait_for_turn(tpm, OP_GET_INFO);
    return TPMLIB_GetInfo((enum TPMLIB_InfoFlags)flags);
}
