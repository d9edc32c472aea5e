/* The TPM: libtpms behind one lock, with the state machine that swtpm has around it.
 *
 *     off ──tpm_init──► on ──tpm_stop──► off
 *      │                 └──tpm_init──► on (a guest's reset)
 *      ├── tpm_init failed ──► off
 *      └──tpm_init_standby──► on, standby ──tpm_admit──► on, active
 *                                       └──tpm_let_go──► off, as if it had not been
 *
 * Beside it stands whose the vTPM is. custody.h has both, and what is done or refused in which:
 * what is said of a function here is for the states in which it is done. Of a vTPM that is another
 * host's, or may be, no file is written, whatever is asked: what is left is a directory with its
 * journal, which the next start takes up.
 *
 * Two threads call in: one executes the guest's commands, the other serves vtpmd. Functions wait
 * for the lock, and with it for the command that runs and for the disk; but tpm_cancel(),
 * tpm_set_locality(), tpm_get_established() and tpm_set_buffer_size() never do. What need not wait
 * for a command that may be long, and what becomes of that, is in long_command.h.
 *
 * Results are libtpms' TPM_RESULTs: 0 is success.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <libtpms/tpm_library.h>

#include "checkpoint.h"
#include "custody.h"
#include "image.h"
#include "link_types.h"

enum {
    TPM_HEADER_BYTES = 10, /* of a command or response: u16 tag, */
    TPM_AT_SIZE = 2,       /* u32 size, */
    TPM_AT_CODE = 6,       /* u32 code */
    TPM_LOCALITY_MAX = 4,
    TPM_BLOB_NOT_FOUND = 0x800, /* swtpm's answer for a blob that is not there; QEMU accepts it */
    /* Of a TPM 2.0; version.h has those of a TPM 1.2: which one is meant is said by the names of
     * these. */
    TPM2_RC_FAILURE = 0x101,
    TPM2_RC_COMMAND_SIZE = 0x142,
    TPM2_RC_RETRY = 0x922,
};

struct anchor;
struct cipher_key;
struct io;
struct journal_settings;
struct nvram_states;
struct store;
struct tpm;

/* The length of the longest command, and response, that the libtpms of this process knows. */
uint32_t tpm_message_bytes_max(void);

/* Where libtpms writes a response. It belongs to the caller, who begins and ends it. */
struct tpm_response {
    uint8_t *bytes;
    uint32_t n_bytes;
    uint32_t n_allocated; /* libtpms may make it larger */
};

void tpm_response_init(struct tpm_response *response);

/* Overwrite a response: it may be an unsealed secret. */
void tpm_response_wipe(struct tpm_response *response);

void tpm_response_deinit(struct tpm_response *response);

/* Have libtpms execute a command, whatever the TPM is. There is always a whole response. */
void tpm_process(uint8_t *command, size_t command_bytes, struct tpm_response *response);

/* Make the TPM of this process, stopped, with its state in `io`. */
struct tpm *tpm_new(struct io *io);

/* Say of which version it is, an enum version_number, before anything else. TPM_BAD_VERSION for
 * what is none, or what the libtpms of this process is without. */
TPM_RESULT tpm_set_version(struct tpm *tpm, uint32_t number);

/* Be able to leave a long command behind. Returns 0 or a negative errno. */
int tpm_start_long_commands(struct tpm *tpm);

/* What a TPM leaves behind in its directory. */
enum tpm_left {
    TPM_LEFT_WHOLE,
    TPM_LEFT_JOURNAL, /* which could not be folded; or QEMU was given the state, and its guest was
                         not seen to run on */
    TPM_LEFT_NOTHING, /* somebody else has removed it, or its files */
};

/* Stop the TPM if it runs, close its journal, overwrite what it held and free it. */
enum tpm_left tpm_free(struct tpm *tpm);

/* Have libcrypto set up now what the first use of it would wait for: that is half of a TPM's start.
 * On the thread that calls tpm_init(), as its random numbers are made by thread. */
void tpm_warm_up(void);

/* Take what a state file holds as the image that a stopped TPM starts from next. */
TPM_RESULT tpm_load_state(struct tpm *tpm, uint32_t type, const uint8_t *state, size_t state_bytes);

/* Make a TPM that is stopped one of this profile, if it is new at its next start. As
 * library_set_profile(). */
TPM_RESULT tpm_set_profile(struct tpm *tpm, const char *profile);

/* Keep journals of the permanent state of a TPM that is stopped, from its next start on. `store`
 * gives the numbers, and has to outlive the TPM. `loaded` is the generation of the state that its
 * files hold, or 0; whose that is may not be known. */
TPM_RESULT tpm_set_journal(struct tpm *tpm, const struct journal_settings *settings,
                           struct store *store, uint64_t loaded, bool is_known);

/* Encrypt the state files of a TPM that is stopped with a key, which is copied. */
TPM_RESULT tpm_set_key(struct tpm *tpm, const struct cipher_key *key);

/* Return that key, or NULL. */
const struct cipher_key *tpm_key(struct tpm *tpm);

/* Write an anchor, whose descriptor is the TPM's then, after each commit of the permanent state and
 * before its response. Only after tpm_set_journal(), and of a TPM that is stopped. */
TPM_RESULT tpm_set_anchor(struct tpm *tpm, const struct anchor *anchor);

/* Make every generation that is still to come larger than `floor`. */
void tpm_raise_generation(struct tpm *tpm, struct store *store, uint32_t type, uint64_t floor);

/* Power the TPM on, from the images or from what tpm_set_state() was given. If it runs it is
 * stopped first. A volatile state is resumed from, and then removed. When it fails, the TPM is
 * stopped and the state files are as they were. A retired TPM starts only if the vTPM `has_come`
 * back to this host. */
TPM_RESULT tpm_init(struct tpm *tpm, bool has_come);

/* Power the TPM on from what tpm_set_state() was given, which has come as a state of this lineage:
 * if the TPM starts, its files are of that one, and its guest sleeps if that says so. Otherwise as
 * tpm_init(). */
TPM_RESULT tpm_init_come(struct tpm *tpm, const struct checkpoint_lineage *lineage);

/* Get where the permanent state stands in its vTPM's history, and whether its guest sleeps. Returns
 * false if there is none, or it is not known whose it is. */
bool tpm_get_lineage(struct tpm *tpm, struct checkpoint_lineage *lineage);

/* Power the TPM on ahead of time, from `states`, for a guest that has `said` so last, and comes:
 * neither its images nor its files change, it answers as one that is stopped, and a retirement goes
 * on. What tpm_set_state() was given is dropped: libtpms takes a state apart once to start from it,
 * where it does so three times to be given two and to start. Otherwise as tpm_init(). */
TPM_RESULT tpm_init_standby(struct tpm *tpm, enum link_shutdown said,
                            const struct nvram_states *states);

/* The guest may use a TPM on standby: its commands wait until it is admitted or let go. */
TPM_RESULT tpm_expect(struct tpm *tpm);

/* Execute the commands of a TPM on standby from now on; its state is the image, and its files'
 * next, and of this lineage. When it fails, the TPM stays on standby, and it may be asked again.
 * One that `goes_back` stays so in any case; if to admit it has failed half way, its state is put
 * into the permanent state's file, as the directory may have no other any more. */
TPM_RESULT tpm_admit(struct tpm *tpm, const struct checkpoint_lineage *lineage, bool goes_back);

/* Power a TPM on standby off, as if it had not been on. No command waits after that, here or for
 * tpm_unretire(). */
void tpm_let_go(struct tpm *tpm);

/* Send TPM2_Shutdown as the guest needs it, if there is that, and power the TPM off. */
TPM_RESULT tpm_stop(struct tpm *tpm);

/* Nobody uses the TPM for now: if it is off, and this host's, fold the journal. The directory is as
 * after the end then. */
void tpm_rest(struct tpm *tpm);

/* As tpm_stop(), and the vTPM is another host's from now on: it was started here in vain. */
TPM_RESULT tpm_stop_fenced(struct tpm *tpm);

/* Execute one command of `command_bytes` bytes, TPM_HEADER_BYTES to tpm_message_bytes_max(). There
 * is always a whole response, no longer than that: TPM_RC_FAILURE from a TPM that is stopped or
 * another host's, TPM_RC_RETRY if that was not known in time, or if what
 * tpm_store_volatile() has left cannot be removed. */
void tpm_execute(struct tpm *tpm, uint8_t *command, size_t command_bytes,
                 struct tpm_response *response);

/* Somebody says by tpm_abandon() when the guest stops; or nobody does. TPM_BAD_ORDINAL without
 * tpm_start_long_commands(). Never waits. */
TPM_RESULT tpm_arm(struct tpm *tpm, bool is_so);

/* The guest stops: a command that may be long, and changes nothing durable yet, has not happened.
 * It is answered with TPM_RC_RETRY. What it has left in libtpms is undone when that is needed.
 * Returns true if there was one. */
bool tpm_abandon(struct tpm *tpm);

/* Make the response a bare header with this code. */
void tpm_respond_error(struct tpm_response *response, uint32_t code);

/* Ask the running command to end early. Without one it does nothing. */
TPM_RESULT tpm_cancel(struct tpm *tpm);

/* The bit is as the last command left it that has been executed. */
TPM_RESULT tpm_get_established(struct tpm *tpm, bool *established);
TPM_RESULT tpm_reset_established(struct tpm *tpm, uint32_t locality);

/* Of the commands from the next one on; the one that runs keeps its own. */
TPM_RESULT tpm_set_locality(struct tpm *tpm, uint32_t locality);
TPM_RESULT tpm_hash_start(struct tpm *tpm);
TPM_RESULT tpm_hash_data(struct tpm *tpm, const uint8_t *data, size_t data_bytes);
TPM_RESULT tpm_hash_end(struct tpm *tpm);

/* Write the running TPM's volatile state into the state directory, and close the journal until the
 * next change. The file is removed before the guest's next command. */
TPM_RESULT tpm_store_volatile(struct tpm *tpm);

/* Get a running TPM's state. The caller frees `*state`, after overwriting it. Who has the permanent
 * state may start the vTPM elsewhere: no file is written until the guest is seen to run on here. */
TPM_RESULT tpm_get_state(struct tpm *tpm, uint32_t type, uint8_t **state, size_t *state_bytes);

/* The state is on storage that hosts share. With `unlocks` its files are let go of, for another
 * host's vTPM, by tpm_unlock_given(); one that `is_to_come` is another's until an INIT. Before
 * anything is loaded. */
void tpm_share(struct tpm *tpm, bool unlocks, bool is_to_come);

/* What has come, to be started next, was another program's: nvram_beware(). */
void tpm_beware(struct tpm *tpm);

/* QEMU has all of the state. */
void tpm_unlock_given(struct tpm *tpm);

/* Have the state's files for this vTPM again, if they are not. Returns 0 or a negative errno; then
 * nothing of this TPM is done that would need them. */
int tpm_lock(struct tpm *tpm);

/* Say that this has failed. */
void tpm_say_locked(int r);

/* Give a stopped TPM the state to start from. libtpms checks it, but for a saved state (saved.h);
 * if it is refused, nothing that was given before is used either. */
TPM_RESULT tpm_set_state(struct tpm *tpm, uint32_t type, const uint8_t *state, size_t state_bytes);

/* As tpm_set_state() of a permanent state, which has come for tpm_init_come() with this lineage, or
 * for tpm_init() if that is NULL: its file is made meanwhile, ahead of that. */
TPM_RESULT tpm_set_come(struct tpm *tpm, const struct checkpoint_lineage *lineage,
                        const uint8_t *state, size_t state_bytes);

/* QEMU is there, and has not started the TPM: it may bring a state. Does not wait for the disk. */
void tpm_await_state(struct tpm *tpm);

/* It is gone: have no file that tpm_set_come() has made ahead, and no room for one. What the TPM
 * was given is started from all the same. */
void tpm_unawait_state(struct tpm *tpm);

/* Write the permanent state's image into its file, if it is durable elsewhere. Commands that store
 * nothing do not wait for that. */
TPM_RESULT tpm_store_permanent(struct tpm *tpm);

/* Drop what tpm_set_state() was given, and a TPM that is on standby. */
TPM_RESULT tpm_forget_state(struct tpm *tpm);

/* Take a running TPM's permanent and volatile state into `store`. `*worked` is true if something
 * ran since the last capture; else nothing is done. `*said` is the guest's last TPM2_Shutdown; of a
 * TPM 1.2, whether there is a saved state. */
TPM_RESULT tpm_capture(struct tpm *tpm, struct store *store, bool *worked,
                       enum link_shutdown *said);

/* A running TPM's states at one moment, each without bytes if there is none. */
struct tpm_copy {
    struct image states[LINK_STATE_SAVESTATE + 1];
    struct checkpoint_lineage
        lineage; /* of the permanent one; all 0: it is not known whose it is */
};

/* Copy them, where a session's captures know nothing of it: the permanent state as it was committed
 * last, and what goes with it. TPM_IOERROR where one could not be stored, which has stopped the
 * TPM: no TPM goes on from what it has. The guest's next command waits for no more than that. The
 * caller ends `copy` in any case. */
TPM_RESULT tpm_copy(struct tpm *tpm, struct tpm_copy *copy);

void tpm_copy_deinit(struct tpm_copy *copy);

/* Return true if something ran since the last capture. */
bool tpm_has_worked(struct tpm *tpm);

/* Answer every command with TPM_RC_FAILURE from now on, and leave state and files as they are: the
 * vTPM is another host's. TPM_FAIL, and no change, if something ran since the last capture or, for
 * `unserved`, since the vTPM came; then the TPM need not be running, and may be on standby. */
TPM_RESULT tpm_retire(struct tpm *tpm, bool unserved);

/* Tell what the TPM is, and whose. Never waits. */
void tpm_look(struct tpm *tpm, enum tpm_power *power, enum tpm_custody *custody);

/* Return true if there is a permanent state to start from. */
bool tpm_has_state(struct tpm *tpm);

/* Return true from an INIT that was answered with success until the TPM is off. Never waits. */
bool tpm_is_running(struct tpm *tpm);

/* The guest runs on here, so far as the vTPM is this host's: what was given away is written again.
 */
void tpm_run_on(struct tpm *tpm);

/* Serve again where tpm_retire() has left off, and write again. */
TPM_RESULT tpm_unretire(struct tpm *tpm);

/* A retired TPM is asked back: while that `is_so`, its commands wait for tpm_unretire(). */
TPM_RESULT tpm_await(struct tpm *tpm, bool is_so);

/* Set the buffer size of a TPM that is stopped, or on standby, or ask for it with 0. */
TPM_RESULT tpm_set_buffer_size(struct tpm *tpm, uint32_t wanted, uint32_t sizes[3]);

/* Get libtpms' description of itself; the caller frees it. NULL without memory. */
char *tpm_get_info(struct tpm *tpm, uint32_t flags);

/* libtpms' callback. */
TPM_RESULT tpm_on_get_locality(TPM_MODIFIER_INDICATOR *locality, uint32_t tpm_number);
